"""Clients that keep sending, and count every request that was not answered."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


def body_of(value=0.0, rows=1):
    tensor = {"name": "x", "shape": [rows, 3, 8, 8], "datatype": "FP32", "data": [value] * 192 * rows}
    return json.dumps({"inputs": [tensor]}).encode()


class Load:
    """Keep-alive clients that send one request after another until refused or told to stop.

    A connection may be refused before anything is sent; any other failure, and any answer but 200, is counted.
    """

    def __init__(self, url, *, clients=16, body=None, keep=True, tls=None):
        self.headers = JSON if keep else {**JSON, "connection": "close"}
        self.address = url.partition("//")[2].split(":")
        self.tls = tls
        self.body = body or body_of()
        self.answers = []
        self.failures = []
        self.refused = 0
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(clients)
        self.running = [self.pool.submit(self._client, number) for number in range(clients)]

    def _client(self, number):
        host, port = self.address[0], int(self.address[1])
        if self.tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=20)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=20, context=self.tls)
        count = 0
        while not self.stopped.is_set():
            if connection.sock is None:
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    self.refused += 1
                    return
            count += 1
            request_id = f"c{number}-{count}"
            try:
                connection.request("POST", INFER, self.body, {**self.headers, "x-request-id": request_id})
                response = connection.getresponse()
                content = response.read()
            except OSError as problem:
                self.failures.append((request_id, repr(problem)))
                return
            except http.client.HTTPException as problem:
                self.failures.append((request_id, repr(problem)))
                return
            if response.status != 200:
                self.failures.append((request_id, response.status, content))
                return
            self.answers.append((request_id, int(json.loads(content)["model_version"]), content))
        connection.close()

    def end(self, *, stop=True):
        if stop:
            self.stopped.set()
        for future in self.running:
            future.result(timeout=60)
        self.pool.shutdown()
        assert self.failures == [], str(self.failures)
        return self.answers
