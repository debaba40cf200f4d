"""Checks of the REST endpoints besides inference: health, metadata, paths and methods, and HTTP itself.

Sources: inference_rest.md and open_inference_rest.yaml of kserve/open-inference-protocol; RFC 9110 and 9112.
"""

from __future__ import annotations

from collections.abc import Callable

from fettle.testing.oip.answers import error_of, read_answer, refusal, success
from fettle.testing.oip.client import Reply, Skipped, short
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import encode, is_text, read_specs

_UNKNOWN = "oip-check-no-such-name"
_UNKNOWN_VERSION = "987654321"
_VERSIONS = 3
_ERROR = "error"


def says_that_it_is_live(server: Server) -> None:
    """`GET /v2/health/live` is exactly 200; where there is a body it says `live` (inference_rest.md)."""
    _affirmed(server.get("/v2/health/live"), ("live",))


def says_that_it_is_ready(server: Server) -> None:
    """`GET /v2/health/ready` is exactly 200; a body says `live`, as the specification has it, or `ready`."""
    _affirmed(server.get("/v2/health/ready"), ("live", "ready"))


def _affirmed(reply: Reply, keys: tuple[str, ...]) -> None:
    """Probes read the status only, and Triton and MLServer send no body: an empty one is good."""
    assert reply.status == 200, f"{reply.asked} must be answered with exactly 200, got {reply}"
    if not reply.body:
        return
    document = reply.json()
    said = {document[key] is True for key in keys if key in document} if isinstance(document, dict) else set()
    names = " or ".join(keys)
    assert said == {True}, f"the body of {reply.asked} must be empty or say that {names} is true, got {reply}"


def describes_itself(server: Server) -> None:
    """`GET /v2` is an object of name, version and a list of extensions (metadata_server_response)."""
    document = success(server.get("/v2"))
    assert isinstance(document, dict), f"server metadata must be an object, got {short(document)}"
    for key in ("name", "version"):
        rule = f"server metadata must have a text as {key}, got {short(document)}"
        assert is_text(document.get(key)), rule
    rule = f"server metadata must have a list of texts as extensions, got {short(document)}"
    assert _are_texts(document.get("extensions")), rule


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(is_text(each) for each in value)


def describes_itself_with_a_slash_too(server: Server) -> None:
    """inference_rest.md says `v2` and open_inference_rest.yaml `/v2/`: both are answered alike, without a redirect."""
    plain, slash = server.get("/v2"), server.get("/v2/")
    assert success(slash) == success(plain), f"/v2/ must be answered as /v2 is, got {slash} and {plain}"


def describes_the_model(server: Server) -> None:
    """The model's metadata has name, platform, inputs and outputs, -1 for free dimensions (metadata_model_response)."""
    reply = server.get(server.path())
    document = success(reply)
    assert isinstance(document, dict), f"model metadata must be an object, got {reply}"
    assert document.get("name") == server.model, f"name must be {server.model!r}, got {short(document.get('name'))}"
    platform = document.get("platform")
    assert isinstance(platform, str), f"model metadata must have a text as platform, got {short(platform)}"
    versions = document.get("versions", [])
    assert _are_texts(versions), f"versions must be a list of texts, got {short(versions)}"
    for part in ("inputs", "outputs"):
        read_specs(document, part)


def describes_each_version(server: Server) -> None:
    """A version that the metadata names can be asked for by path, and has inputs and outputs too."""
    for version in server.versions[:_VERSIONS]:
        document = success(server.get(server.path(version=version)))
        name = document.get("name") if isinstance(document, dict) else None
        assert name == server.model, f"version {version}: name must be {server.model!r}, got {short(name)}"
        for part in ("inputs", "outputs"):
            read_specs(document, part)


def says_that_the_model_is_ready(server: Server) -> None:
    """`GET .../ready` is exactly 200; a body has the name and `ready` ($ready_model_response)."""
    _model_ready(server, server.get(server.path("/ready")))


def says_that_a_version_is_ready(server: Server) -> None:
    """`GET .../versions/VERSION/ready` is exactly 200; of the versions that are named one at least is ready."""
    replies = [server.get(server.path("/ready", version=version)) for version in server.versions[:_VERSIONS]]
    ready = [reply for reply in replies if reply.status == 200]
    assert ready, f"one of the versions must be ready with exactly 200, got {replies[0]}"
    for reply in ready:
        _model_ready(server, reply)


def _model_ready(server: Server, reply: Reply) -> None:
    _affirmed(reply, ("ready",))
    if reply.body:
        name = reply.json().get("name")
        assert name == server.model, f"the body of {reply.asked} must have the name {server.model!r}, got {short(name)}"


def answers_with_the_type_of_json(server: Server) -> None:
    """Metadata, answers and errors have the content type application/json (open_inference_rest.yaml)."""
    bad = server.infer(b"{")
    for reply in (server.get("/v2"), server.get(server.path()), server.infer(server.good()), bad):
        kind = reply.header("content-type").partition(";")[0].strip().lower()
        assert kind == "application/json", f"{reply.asked} must be answered as application/json, got {reply}"


def refuses_unknown_models(server: Server) -> None:
    """Metadata of a model that is not there, and inference with it, are 4xx with an error; it is not ready either."""
    refusal(server.get(server.path(model=_UNKNOWN, version="")), "metadata of an unknown model")
    path = server.path("/infer", model=_UNKNOWN, version="")
    refusal(server.request("POST", path, encode(server.good())), "inference with an unknown model")
    ready = server.get(server.path("/ready", model=_UNKNOWN, version=""))
    assert ready.status >= 400, f"an unknown model must not be ready, got {ready}"


def refuses_unknown_versions(server: Server) -> None:
    """The same for a version that is not there: the server may choose only where no version is asked for.

    501 is as good: versions are optional, and a server without them has not implemented the path (RFC 9110 15.6.2).
    """
    refusal(server.get(server.path(version=_UNKNOWN_VERSION)), "metadata of an unknown version", also=501)
    refusal(server.infer(server.good(), version=_UNKNOWN_VERSION), "inference with an unknown version", also=501)
    ready = server.get(server.path("/ready", version=_UNKNOWN_VERSION))
    assert ready.status >= 400, f"an unknown version must not be ready, got {ready}"


def refuses_unknown_paths(server: Server) -> None:
    """Paths that are none are 4xx with an error: clients read `error` from whatever is not 200 (tritonclient)."""
    for path in (f"/v2/{_UNKNOWN}", server.path(f"/{_UNKNOWN}"), "/v2/models//infer"):
        refusal(server.get(path), f"GET {path}")


def refuses_wrong_methods(server: Server) -> None:
    """A method that a path does not have is 405, which names those it has in Allow (RFC 9110 15.5.6), or 404."""
    tried = (("GET", server.path("/infer")), ("POST", "/v2/health/live"), ("DELETE", server.path()), ("PUT", "/v2"))
    for method, path in tried:
        reply = server.request(method, path)
        what = f"{method} {path}"
        assert reply.status in (404, 405), f"{what} must be refused with 405 or 404, got {reply}"
        error_of(reply, what)
        if reply.status == 405:
            assert reply.header("allow"), f"{what}: an answer with 405 must have the header Allow, got none"


def answers_head_without_a_body(server: Server) -> None:
    """`HEAD` of what `GET` answers is 200 or 405, and has no body, which would be taken for the next answer."""
    for path in ("/v2/health/live", "/v2"):
        with server.connect() as connection:
            answer = connection.exchange(connection.head("HEAD", path, {"Connection": "close"}))
        head, _, rest = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        assert status in ([b"200"], [b"405"]), f"HEAD {path} must be answered with 200 or 405, got {short(answer)}"
        assert not rest, f"the answer to HEAD {path} must have no body, got {short(rest)}"


def keeps_the_order_of_a_connection(server: Server) -> None:
    """On one connection each request gets its own answer, after errors too; a close is announced (RFC 9112 9.3)."""
    infer, good = server.path("/infer"), encode(server.good())
    unknown = server.path("/infer", model=_UNKNOWN, version="")
    plan = [
        ("GET", "/v2", b"", "extensions"),
        ("POST", infer, good, "outputs"),
        ("POST", infer, b"{" * 1000, _ERROR),
        ("GET", server.path(), b"", "platform"),
        ("POST", unknown, b" " * 300_000 + good, _ERROR),
        ("POST", infer, good, "outputs"),
        ("PUT", infer, good, _ERROR),
        ("GET", f"/v2/{_UNKNOWN}", b"", _ERROR),
        ("GET", "/v2", b"", "extensions"),
    ]
    with server.connect() as connection:
        for turn, (method, path, body, key) in enumerate(plan, start=1):
            reply = connection.request(method, path, body, {"Content-Type": "application/json"} if body else None)
            rule = f"request {turn} on a connection, {method} {path}, must get its own {key}, got {reply}"
            if key == _ERROR:
                assert 400 <= reply.status < 500, rule
                continue
            document = reply.json()
            assert isinstance(document, dict), rule
            assert key in document, rule


def takes_chunked_bodies_or_asks_for_a_length(server: Server) -> None:
    """`Transfer-Encoding: chunked` is understood (RFC 9112 7.1) or refused with 411 (RFC 9110 15.5.12)."""
    body = encode(server.good())
    parts = [body[:7], body[7:]]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    reply = server.infer(chunked, {"Transfer-Encoding": "chunked"})
    if reply.status == 411:
        error_of(reply, "a chunked body")
    else:
        read_answer(server, reply)


def survives_a_body_cut_short(server: Server) -> None:
    """A body that ends before its Content-Length is not answered with 200, and the server goes on."""
    body = encode(server.good())
    if server.url.startswith("https:"):
        raise Skipped("a half-closed connection cannot be told apart from a broken one over TLS")
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body) + 10), "Connection": "close"}
    with server.connect() as connection:
        answer = connection.exchange(connection.head("POST", server.path("/infer"), headers) + body, cut=True)
    assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.0 2")), (
        f"a cut body must not be answered, got {short(answer)}"
    )
    success(server.infer(server.good()))


CHECKS: tuple[Callable[[Server], None], ...] = (
    says_that_it_is_live,
    says_that_it_is_ready,
    describes_itself,
    describes_itself_with_a_slash_too,
    describes_the_model,
    describes_each_version,
    says_that_the_model_is_ready,
    says_that_a_version_is_ready,
    answers_with_the_type_of_json,
    refuses_unknown_models,
    refuses_unknown_versions,
    refuses_unknown_paths,
    refuses_wrong_methods,
    answers_head_without_a_body,
    keeps_the_order_of_a_connection,
    takes_chunked_bodies_or_asks_for_a_length,
    survives_a_body_cut_short,
)
