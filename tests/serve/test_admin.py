"""The admin port: a server that loads and unloads models on request, and only for who may ask."""

import contextlib
import logging
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fettle.core.errors import NotRegistered, UsageError
from fettle.serve.entry import sockets_of
from fettle.serve.key_file import add_key
from fettle.serve.keys import new_key
from fettle.serve.listener import bind
from fettle.serve.options import ServeOptions
from fettle.serve.source import FolderSource

JSON = {"content-type": "application/json"}
INDEX = "/v2/repository/index"
ADMIN_ONLY = (INDEX, "/v2/repository/models/extra/load", "/v2/repository/models/extra/unload")


def change(name, what):
    return f"/v2/repository/models/{name}/{what}"


class Cupboard:
    """A catalogue of folders."""

    def __init__(self, **folders):
        self.folders = folders
        self.asked = []

    def names(self):
        return sorted(self.folders)

    def source(self, name):
        self.asked.append(name)
        if name not in self.folders:
            raise NotRegistered(f"no model {name}")
        return FolderSource(name, self.folders[name])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A key file, and the headers of each key in it."""
    root, headers = tmp_path_factory.mktemp("keys"), {}
    for name, models, actions in (
        ("ops", "*", ["admin", "read", "infer"]), ("extra-only", ["extra"], ["admin"]), ("infer", "*", ["infer"]),
    ):  # fmt: skip
        key, text = new_key(name, models=models, actions=actions)
        add_key(root / "keys.json", key)
        headers[name] = {"authorization": f"Bearer {text}"}
    return root / "keys.json", headers


class Administered:
    """A server with both ports, and clients that send the key "ops"."""

    def __init__(self, server, headers):
        self.server = server
        self.headers = headers
        self.public = server.client(headers=headers["ops"])
        self.admin = httpx.Client(base_url=server.admin_url, timeout=20, trust_env=False, headers=headers["ops"])

    def index(self, **body):
        return self.admin.post(INDEX, json=body).json()

    def infer(self, name, body):
        return self.public.post(f"/v2/models/{name}/infer", content=body, headers=JSON)


@pytest.fixture(scope="module")
def administered(kit, shelf_root, keys):
    """One server for all tests that leave it as they found it: "tiny" loaded, "extra" not."""
    path, headers = keys
    cupboard = Cupboard(extra=shelf_root / "2", broken=shelf_root / "none")
    options = {"keys": path, "admin_port": 0, "catalogue": cupboard, "workers": 1, "access_log": True}
    server = kit.Running(kit.Shelf(shelf_root), **options).wait_ready()
    one = Administered(server, headers)
    one.cupboard = cupboard
    with contextlib.closing(one.public), contextlib.closing(one.admin):
        yield one
    assert server.stop() == 0


def test_a_model_is_listed_loaded_answers_and_is_unloaded(administered, kit):
    body = kit.body_of()
    states = {entry["name"]: entry for entry in administered.index()}
    assert states["tiny"] == {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    assert states["extra"] == {"name": "extra", "version": "", "state": "UNAVAILABLE", "reason": "not loaded"}
    assert [entry["name"] for entry in administered.index(ready=True)] == ["tiny"]
    kit.error_of(administered.infer("extra", body), 404)
    for _ in range(2):
        response = administered.admin.post(change("extra", "load"), json={})
        assert (response.status_code, response.content) == (200, b"")
        assert administered.infer("extra", body).status_code == 200
        assert {entry["name"] for entry in administered.index(ready=True)} == {"tiny", "extra"}
        parameters = {"parameters": {"unload_dependents": False}}
        assert administered.admin.post(change("extra", "unload"), json=parameters).status_code == 200
        kit.error_of(administered.infer("extra", body), 404)
    kit.error_of(administered.admin.post(change("extra", "unload"), content=b""), 404)
    assert administered.infer("tiny", body).status_code == 200


def test_a_model_that_cannot_be_loaded_says_why_and_harms_nobody(administered, kit):
    error = kit.error_of(administered.admin.post(change("broken", "load"), content=b""), 400)
    assert "broken cannot be loaded" in error
    kit.error_of(administered.admin.post(change("unknown", "load"), content=b""), 404)
    assert administered.infer("tiny", kit.body_of()).status_code == 200
    assert administered.public.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"config": '{"max_batch_size": 1}'}, {"file:1/model.onnx": "AAAA"}, {"url": "http://127.0.0.1/model"},
        {"path": "/srv/models"}, {"config": "", "file:a": ""}, {"anything": 1},
    ],
    ids=range(6),
)  # fmt: skip
def test_nothing_that_a_client_brings_is_loaded(administered, kit, parameters):
    asked = list(administered.cupboard.asked)
    error = kit.error_of(administered.admin.post(change("extra", "load"), json={"parameters": parameters}), 400)
    assert "never from files" in error
    assert administered.cupboard.asked == asked


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (INDEX, b"{"), (INDEX, b'{"ready": 1}'), (INDEX, b'{"read": true}'), (INDEX, b"[" * 100_000), (INDEX, b"[]"),
        (change("extra", "load"), b'{"parameters": 1}'), (change("extra", "load"), b'{"source": "x"}'),
        (change("extra", "unload"), b'{"parameters": {"unload_dependents": 1}}'),
        (change("tiny", "unload"), b'{"parameters": {"other": true}}'),
    ],
    ids=range(9),
)  # fmt: skip
def test_bad_bodies_are_400_and_change_nothing(administered, kit, path, body):
    kit.error_of(administered.admin.post(path, content=body), 400)
    assert administered.infer("tiny", kit.body_of()).status_code == 200


def test_a_compressed_body_is_415(administered, kit):
    kit.error_of(administered.admin.post(INDEX, content=b"{}", headers={"content-encoding": "gzip"}), 415)


def test_the_public_port_has_none_of_it(administered, kit):
    for path in ADMIN_ONLY:
        assert "no such path" in kit.error_of(administered.public.post(path, content=b""), 404)


def test_the_admin_port_has_health_and_metrics_and_no_inference(administered, kit):
    for path in ("/health", "/metrics", "/health/live", "/v2/health/ready"):
        assert administered.admin.get(path).status_code == 200
    for path in ("/predict", "/v2/models/tiny/infer"):
        kit.error_of(administered.admin.post(path, content=b""), 404)
    kit.error_of(administered.admin.get("/v2"), 404)
    assert kit.error_of(administered.admin.get(INDEX), 405)
    administered.admin.post(INDEX, content=b"")
    assert 'fettle_requests_total{code="200",route="/v2/repository/index"}' in administered.admin.get("/metrics").text


def test_only_admin_keys_administer_and_only_their_models(administered, kit):
    with httpx.Client(base_url=administered.server.admin_url, trust_env=False, timeout=20) as client:
        for path in ADMIN_ONLY:
            assert kit.error_of(client.post(path, content=b""), 401)
            assert kit.error_of(client.post(path, content=b"", headers=administered.headers["infer"]), 403)
        limited = administered.headers["extra-only"]
        assert client.post(INDEX, content=b"", headers=limited).status_code == 200
        assert client.post(change("extra", "load"), content=b"", headers=limited).status_code == 200
        assert kit.error_of(client.post(change("tiny", "unload"), content=b"", headers=limited), 403)
        kit.error_of(client.get("/metrics", headers=limited), 403)
        assert client.post(change("extra", "unload"), content=b"", headers=limited).status_code == 200
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]", "", "a b", "0.0.0.0"],
)  # fmt: skip
def test_a_foreign_host_is_refused_even_with_a_key(administered, kit, host):
    kit.error_of(administered.admin.post(INDEX, content=b"", headers={"host": host}), 421)
    kit.error_of(administered.admin.get("/health/live", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.0.0.1:1234", "[::1]", "[::1]:80"])
def test_local_hosts_are_welcome(administered, host):
    assert administered.admin.post(INDEX, content=b"", headers={"host": host}).status_code == 200


def test_a_configured_name_is_welcome(start, shelf, keys):
    path, headers = keys
    server = start(shelf, keys=path, admin_port=0, admin_names=("Ops.Example",))
    with httpx.Client(base_url=server.admin_url, trust_env=False, headers=headers["ops"]) as client:
        assert client.post(INDEX, content=b"", headers={"host": "ops.example:9000"}).status_code == 200


def test_request_ids_and_the_access_log_are_as_on_the_public_port(administered, caplog):
    with caplog.at_level(logging.INFO, "fettle.serve"):
        response = administered.admin.post(INDEX, content=b"", headers={"x-request-id": "mine"})
        administered.admin.post(change("extra", "load"), content=b"")
        administered.admin.post(change("extra", "unload"), content=b"")
    assert response.headers["x-request-id"] == "mine"
    said = [record.about for record in caplog.records if "status" in getattr(record, "about", {})]
    (line,) = [one for one in said if one["request_id"] == "mine"]
    assert (line["path"], line["key"], line["status"]) == (INDEX, "ops", 200)
    assert "extra was loaded by key 'ops'" in caplog.text


def test_the_index_answers_while_a_model_loads(administered, kit):
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(administered.admin.post, change("extra", "load"), content=b"")
        kit.until(lambda: loading.done() or any(one["state"] == "LOADING" for one in administered.index()))
        assert loading.result().status_code == 200
    assert administered.admin.post(change("extra", "unload"), content=b"").status_code == 200


def test_sigterm_drains_both_ports(start, shelf, keys):
    path, _ = keys
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    server = start(shelf.root, process=True, keys=path, admin_port=port).wait_ready()
    with socket.create_connection(("127.0.0.1", port)) as silent:
        server.signal(signal.SIGTERM)
        assert server.wait() == (0, "torch False")
        assert silent.recv(10) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_an_admin_port_in_use_is_an_error_and_leaves_no_port_open(keys):
    with bind("127.0.0.1", 0) as taken, bind("127.0.0.1", 0) as free:
        ports = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        with pytest.raises(UsageError, match=f"127.0.0.1:{ports[0]}"):
            sockets_of(ServeOptions(port=ports[1], admin_port=ports[0], keys=keys[0]))
        bind("127.0.0.1", ports[1]).close()
