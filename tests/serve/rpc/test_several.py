"""Splits, sticky keys and shadows of calls over gRPC: as over HTTP."""

from fettle.serve import process
from fettle.serve.rpc import messages
from fettle.serve.source import FolderSource
from fettle.serve.traffic import Sticky, Traffic, Variant


def split(root, **more):
    variants = (Variant(FolderSource("tiny", root / name, int(name)), 50, f"v{name}") for name in ("1", "2"))
    return Traffic(tuple(variants), **more)


def test_a_sticky_key_may_stand_in_the_metadata(rpc, start, shelf, kit):
    models = [split(shelf.root, sticky=Sticky.parse("header:X-User-Id")), FolderSource("other", shelf.root / "2", 2)]
    server = start(models, workers=1, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client, server.client() as http:
        kit.until(lambda: len(http.get("/v2/models/tiny").json()["versions"]) == 2)
        metadata = client.call("ModelMetadata", messages.ModelMetadataRequest(name="tiny"))
        assert sorted(metadata.versions) == ["1", "2"]
        assert client.infer(rpc.image_request(model="other")).model_version == "2"
        assert client.infer(rpc.image_request(model_version="2")).model_version == "2"
        found = {}
        for user in "abcdefghijkl":
            versions = {
                client.infer(rpc.image_request(float(value)), metadata=(("x-user-id", user),)).model_version
                for value in range(3)
            }
            body = http.post("/v2/models/tiny/infer", content=kit.body_of(), headers={"x-user-id": user}).json()
            assert versions == {body["model_version"]}
            found[user] = versions.pop()
        assert set(found.values()) == {"1", "2"}


def test_a_shadow_gets_a_copy_of_a_call(rpc, start, shelf, kit, monkeypatch):
    # Else the shadow's worker has only what others leave, which on a busy machine is nothing for minutes.
    monkeypatch.setattr(process, "give_way", lambda pid: None)
    traffic = Traffic(
        (Variant(FolderSource("tiny", shelf.root / "1", 1)),), shadow=FolderSource("tiny", shelf.root / "2", 2)
    )
    server = start(traffic, workers=1, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client, server.client() as http:
        kit.until(lambda: http.get("/health").json()["models"][0]["shadow"]["version"] == 2)
        assert client.infer(rpc.image_request()).model_version == "1"
        kit.until(lambda: compared(http.get("/metrics").text))


def compared(text):
    """Rows that the shadow answered."""
    lines = (line for line in text.splitlines() if line.startswith("fettle_shadow_rows_total"))
    return sum(float(line.split()[-1]) for line in lines)
