"""Real servers of several models and versions: split, sticky, loaded and unloaded while they answer."""

import asyncio
import contextlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from pyarrow import parquet

from fettle.serve.server import Service
from fettle.serve.source import FolderSource
from fettle.serve.traffic import Sticky, Traffic, Variant

JSON = {"content-type": "application/json"}
PNG = {"content-type": "image/png"}


def split(root, name, *, sticky=None, weights=(50, 50)):
    variants = zip(("1", "2"), weights, ("old", "new"), strict=True)
    return Traffic(
        tuple(
            Variant(FolderSource(name, root / folder, int(folder)), weight, label) for folder, weight, label in variants
        ),
        sticky=sticky and Sticky.parse(sticky),
    )


def infer(client, name, body, *, version=None, **options):
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    return client.post(f"{path}/infer", content=body, headers={**JSON, **options})


def metric(client, series):
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(series + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.fixture(scope="module")
def several(shelf_root, kit, tmp_path_factory):
    """One server: a model for each kind of key, and one that is not split."""
    logs = tmp_path_factory.mktemp("logs")
    models = [
        split(shelf_root, "header", sticky="header:X-User-Id"),
        split(shelf_root, "cookie", sticky="cookie:session"),
        split(shelf_root, "payload", sticky="payload"),
        FolderSource("plain", shelf_root / "1", 1),
    ]
    server = kit.Running(models, workers=1, observations=logs / "{model}").wait_ready()
    with contextlib.closing(server.client()) as client:
        kit.until(
            lambda: all(v["version"] for model in client.get("/health").json()["models"] for v in model["variants"])
        )
        yield client
    assert server.stop() == 0
    for name in ("header", "plain"):
        (path,) = (logs / name).glob("*.parquet")
        assert set(parquet.read_table(path)["model"].to_pylist()) == {name}


def test_each_model_answers_under_its_name(several, kit):
    for name in ("header", "cookie", "payload", "plain"):
        assert infer(several, name, kit.body_of()).json()["model_name"] == name
        answer = several.post(f"/predict/{name}", content=kit.picture(), headers=PNG).json()
        assert (answer["model"], answer["class"]) == (name, "red")
    assert several.post("/predict", content=kit.picture(), headers=PNG).json()["model"] == "header"


def test_an_unknown_model_is_404_and_the_others_are_named(several, kit):
    for response in (
        infer(several, "dogs", kit.body_of()),
        several.post("/predict/dogs", content=kit.picture(), headers=PNG),
        several.get("/v2/models/dogs"),
    ):
        assert kit.error_of(response, 404).endswith("this server has header, cookie, payload, plain")
    assert "no such path" in kit.error_of(several.post("/predict/plain/more", content=b"", headers=PNG), 404)
    assert several.get("/predict/plain").status_code == 405


@pytest.mark.parametrize("name", ["header", "cookie"])
def test_a_user_stays_with_one_version(several, kit, name):
    def as_user(number):
        sent = {"header": {"x-user-id": f"user-{number}"}, "cookie": {"cookie": f"theme=dark; session=s{number}"}}
        return sent[name]

    first = [infer(several, name, kit.body_of(), **as_user(number)).json()["model_version"] for number in range(60)]
    again = [infer(several, name, kit.body_of(2.0), **as_user(number)).json()["model_version"] for number in range(60)]
    predicted = [
        several.post(f"/predict/{name}", content=kit.picture(), headers={**PNG, **as_user(number)}).json()["version"]
        for number in range(10)
    ]
    assert first == again
    assert [str(version) for version in predicted] == first[:10]
    # Half of 60, and six standard deviations of a binomial: for these users it is always the same.
    assert 30 - 24 <= Counter(first)["1"] <= 30 + 24


def test_a_payload_stays_with_one_version(several, kit):
    def answers():
        return [infer(several, "payload", kit.body_of(number)).json()["model_version"] for number in range(40)]

    first = answers()
    assert first == answers()
    assert set(first) == {"1", "2"}


def test_without_a_key_the_split_is_exact_and_counted(several, kit):
    series = 'fettle_assigned_total{{model="header",variant="{}",version="{}"}}'
    before = [metric(several, series.format(*one)) for one in (("old", 1), ("new", 2))]
    requests = 'fettle_model_requests_total{code="200",model="header",version="1"}'
    had = metric(several, requests)
    found = Counter(infer(several, "header", kit.body_of()).json()["model_version"] for _ in range(40))
    assert abs(found["1"] - 20) <= 3
    after = [metric(several, series.format(*one)) for one in (("old", 1), ("new", 2))]
    assert [now - was for now, was in zip(after, before, strict=True)] == [found["1"], found["2"]]
    assert metric(several, requests) - had == found["1"]


def test_a_version_can_be_asked_for(several, kit):
    for version in ("1", "2"):
        answers = [infer(several, "header", kit.body_of(), version=version) for _ in range(5)]
        assert {answer.json()["model_version"] for answer in answers} == {version}
        assert several.get(f"/v2/models/header/versions/{version}/ready").status_code == 200
    assert "header answers as 1, 2" in kit.error_of(infer(several, "header", kit.body_of(), version="3"), 404)
    assert several.get("/v2/models/header/versions/3/ready").status_code == 404


def test_metadata_and_metrics_name_all_that_answer(several):
    assert several.get("/v2/models/header").json()["versions"] == ["1", "2"]
    assert several.get("/v2/models/plain").json()["versions"] == ["1"]
    text = several.get("/metrics").text
    for name, version in (("header", 1), ("header", 2), ("cookie", 1), ("plain", 1)):
        assert any(
            line.startswith("fettle_model_info{") and f'model="{name}"' in line and f'version="{version}"' in line
            for line in text.splitlines()
        )


def test_health_lists_models_and_keeps_the_first_at_its_top(several):
    body = several.get("/health").json()
    assert (body["status"], body["model"], body["version"], body["problem"]) == ("ready", "header", 1, None)
    assert [model["name"] for model in body["models"]] == ["header", "cookie", "payload", "plain"]
    (old, new) = body["models"][0]["variants"]
    assert (old["variant"], old["weight"], old["version"]) == ("old", 50, 1)
    assert old["digest"] == body["digest"] != new["digest"]
    assert [model["sticky"] for model in body["models"]] == ["header:X-User-Id", "cookie:session", "payload", None]


# One of several is not well


def test_a_bad_variant_takes_no_traffic_and_a_bad_model_keeps_the_server_unready(start, shelf, kit):
    (shelf.root / "2" / "model.onnx").write_bytes(b"junk")
    server = start(split(shelf.root, "tiny", weights=(1, 99))).wait_ready()
    with server.client() as client:
        health = kit.until(
            lambda: (b := client.get("/health").json())["models"][0]["variants"][1]["problem"] is not None and b
        )
        assert health["ready"] is True
        assert health["models"][0]["variants"][1]["problem"].startswith("version 2 was refused")
        found = {infer(client, "tiny", kit.body_of()).json()["model_version"] for _ in range(20)}
        assert found == {"1"}
    assert server.stop() == 0
    server = start([FolderSource("good", shelf.root / "1", 1), FolderSource("bad", shelf.root / "2", 2)])
    with server.client() as client:
        kit.until(lambda: client.get("/health").json()["status"] == "failed")
        kit.until(lambda: client.get("/v2/models/good/ready").status_code == 200)
        assert client.get("/v2/models/bad/ready").status_code == 503
        assert client.get("/health/ready").status_code == 503
        assert infer(client, "good", kit.body_of()).status_code == 200
        assert "no version of bad is ready" in kit.error_of(infer(client, "bad", kit.body_of()), 503)


def test_a_split_under_load_loses_nothing_while_a_variant_moves(start, shelf, kit):
    moving = Traffic((Variant(FolderSource("tiny", shelf.root / "1", 1), 80), Variant(shelf, 20)))
    shelf.point(2)
    server = start(moving).wait_ready()
    with server.client() as client:
        kit.until(lambda: client.get("/v2/models/tiny").json()["versions"] == ["1", "2"])
        load = kit.Load(server.url, clients=6)
        kit.until(lambda: len(load.answers) > 200)
        shelf.point(1)
        kit.until(lambda: client.get("/v2/models/tiny").json()["versions"] == ["1"])
        moved = len(load.answers)
        kit.until(lambda: len(load.answers) > moved + 100)
    counts = Counter(version for _, version, _ in load.end()[:200])
    assert abs(counts[2] - 40) <= 12  # exact but for the six requests under way, and answers that overtake others


# Loaded and unloaded while the server runs


class Books:
    """A catalogue of whatever lies in the folder."""

    def __init__(self, root):
        self.root = root

    def names(self):
        return ["late"]

    def source(self, name):
        return FolderSource(name, self.root / "2", 2)


@pytest.fixture
def managed(kit):
    """A server whose models a test can load and unload: `managed.call(method, name)` waits for that."""

    class Managed(kit.Running):
        async def _serve(self):
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            models, catalogue = self._source
            service = Service(models, self.options, catalogue=catalogue, on_ready=lambda _: self._ready.set())
            self.models, self.url = service.models, service.url
            await service.start()
            self._listening.set()
            await self._stop.wait()
            self.code = 0 if await service.drain() else 1

        def call(self, method, *arguments):
            work = getattr(self.models, method)(*arguments)
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    servers = []

    def begin(*models, catalogue=None, **options):
        servers.append(Managed((models, catalogue), **options))
        return servers[-1].wait_ready()

    yield begin
    for server in servers:
        server.stop()


def ask(url, name, body, count):
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        return [infer(client, name, body) for _ in range(count)]


def test_unload_under_load_loses_nothing_but_clear_404s(managed, shelf, kit):
    gone = FolderSource("gone", shelf.root / "2", 2)
    server = managed(FolderSource("stays", shelf.root / "1", 1), gone, catalogue=Books(shelf.root))
    with server.client() as client, ThreadPoolExecutor(6) as pool:
        leaving = [pool.submit(ask, server.url, "gone", kit.body_of(0.5), 150) for _ in range(3)]
        staying = [pool.submit(ask, server.url, "stays", kit.body_of(0.5), 100) for _ in range(3)]
        kit.until(lambda: metric(client, 'fettle_model_requests_total{code="200",model="gone",version="2"}') > 30)
        server.call("unload", "gone")
        refused = infer(client, "gone", kit.body_of())
        assert kit.error_of(refused, 404) == "unknown model 'gone'; this server has stays"
        for future in leaving:
            codes = [response.status_code for response in future.result()]
            assert codes == sorted(codes), "never 200 again after the first 404"
            assert set(codes) <= {200, 404}
        for response in (one for future in staying for one in future.result()):
            assert response.status_code == 200
            assert response.json()["outputs"][0]["data"] == pytest.approx([2.5] * 3)
        assert [(e.name, e.state) for e in server.call("index")] == [
            ("gone", "UNAVAILABLE"),
            ("late", "UNAVAILABLE"),
            ("stays", "READY"),
        ]
        assert 'model="gone"' not in "".join(
            line for line in client.get("/metrics").text.splitlines() if line.startswith("fettle_model_info")
        )
        server.call("load", "late")
        assert infer(client, "late", kit.body_of()).json()["model_version"] == "2"
        server.call("load", "gone")
        assert json.loads(infer(client, "gone", kit.body_of()).content)["model_version"] == "2"
    assert server.stop() == 0
