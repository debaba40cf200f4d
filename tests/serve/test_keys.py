"""API keys: the value, the file, and what a server that asks for them answers."""

import hashlib
import json
import logging
import re
import stat
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.serve.guard import presented
from fettle.serve.key_file import KeyFile, add_key, change_keys, read_keys, remove_key
from fettle.serve.keys import MAX_KEYS, Key, Keys, new_key
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


def entry(name="a", text="secret", models="*", actions=("infer",)):
    return Key(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), models=models, actions=list(actions))


def refused(keys, *arguments):
    with pytest.raises(Refusal) as caught:
        keys.authorize(*arguments)
    return caught.value


# The value


def test_a_new_key_is_random_prefixed_and_kept_only_as_its_hash():
    (one, first), (_, second) = (new_key("a", models="*", actions=["infer"]) for _ in range(2))
    assert first != second
    assert re.fullmatch(r"fettle_[A-Za-z0-9_-]{43}", first)
    assert one.sha256 == hashlib.sha256(first.encode()).hexdigest()
    assert first not in repr(one)


@pytest.mark.parametrize("models", ["*", ["digits"], ["digits", "other"]])
@pytest.mark.parametrize("actions", [["infer"], ["read"], ["admin"], ["infer", "read"]])
def test_a_key_is_good_for_its_models_and_actions_and_nothing_else(models, actions):
    keys = Keys([entry("x", "unrelated"), entry("a", "secret", models, actions)])
    for model in (None, "digits", "other", "third"):
        for action in ("infer", "read", "admin"):
            good = action in actions and (model is None or models == "*" or model in models)
            if good:
                assert keys.authorize("secret", model, action) == "a"
            else:
                assert refused(keys, "secret", model, action).status == 403


@given(st.one_of(st.none(), st.text(max_size=300)))
def test_no_other_text_is_a_key(text):
    keys = Keys([entry(text="the-only-one")])
    if text != "the-only-one":
        found = refused(keys, text, "digits", "infer")
        assert found.status == 401
        assert found.headers["www-authenticate"].startswith("Bearer")
        assert not text or len(text) < 12 or text not in found.message


def test_no_keys_at_all_let_nobody_in():
    assert refused(Keys([]), None, None, "read").status == 401
    assert refused(Keys([]), "", None, "read").status == 401


def test_every_entry_is_compared_wherever_the_key_is(monkeypatch):
    compared = []
    monkeypatch.setattr("fettle.serve.keys.hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    keys = Keys([entry(f"k{number}", f"text{number}") for number in range(5)])
    for text in ("text0", "text4", "unknown"):
        compared.clear()
        if text == "unknown":
            refused(keys, text, None, "infer")
        else:
            keys.authorize(text, None, "infer")
        assert len(compared) == 5


def test_the_check_takes_microseconds():
    keys = Keys([entry(f"k{number}", f"text{number}") for number in range(10)])
    best = min(_seconds(lambda: keys.authorize("text9", "digits", "infer"), 200) for _ in range(5))
    assert best < 100e-6  # some 2 µs on a quiet machine


def _seconds(call, times):
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None), ({"authorization": "Bearer abc"}, "abc"), ({"authorization": "BEARER  abc "}, "abc"),
        ({"x-api-key": "abc"}, "abc"), ({"authorization": "Basic dTpw", "x-api-key": "abc"}, "abc"),
        ({"authorization": "Bearer abc", "x-api-key": "other"}, "abc"), ({"authorization": "Bearer"}, ""),
    ],
)  # fmt: skip
def test_where_a_client_may_put_its_key(headers, key):
    assert presented(headers) == key


# The file


def file_of(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return path


ENTRY = {"name": "a", "sha256": "0" * 64, "models": "*", "actions": ["infer"]}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "nonsense", "[" * 100_000, {"keys": {}}, {"keys": [], "more": 1},
        {"keys": [{**ENTRY, "key": "x"}]}, {"keys": [{**ENTRY, "sha256": "0" * 63}]},
        {"keys": [{**ENTRY, "sha256": "G" * 64}]},
        {"keys": [{**ENTRY, "models": "digits"}]}, {"keys": [{**ENTRY, "models": []}]},
        {"keys": [{**ENTRY, "models": ["../x"]}]}, {"keys": [{**ENTRY, "actions": ["write"]}]},
        {"keys": [{**ENTRY, "actions": []}]}, {"keys": [{**ENTRY, "name": "not a name"}]}, {"keys": [ENTRY, ENTRY]},
        {"keys": [ENTRY, {**ENTRY, "name": "b"}]}, {"keys": [{k: v for k, v in ENTRY.items() if k != "models"}]},
        {"keys": [{**ENTRY, "name": f"k{n}", "sha256": f"{n:064x}"} for n in range(MAX_KEYS + 1)]},
    ],
    ids=range(20),
)  # fmt: skip
def test_a_file_that_is_no_key_file_is_an_error_that_names_it(tmp_path, content):
    path = file_of(tmp_path / "keys.json", content)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        read_keys(path)


def test_a_missing_file_and_one_that_anyone_may_write_are_errors(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "none.json")
    path = file_of(tmp_path / "keys.json", {"keys": [ENTRY]})
    path.chmod(0o666)
    with pytest.raises(UsageError, match="chmod 600"):
        read_keys(path)


def test_keys_are_added_and_removed_for_the_owners_eyes_only(tmp_path):
    path = tmp_path / "deep" / "keys.json"
    add_key(path, entry("a", "one"))
    add_key(path, entry("b", "two", ["digits"], ["read"]))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in read_keys(path).entries] == ["a", "b"]
    with pytest.raises(UsageError, match="already"):
        add_key(path, entry("a", "three"))
    remove_key(path, "a")
    with pytest.raises(UsageError, match="there are: b"):
        remove_key(path, "a")
    remove_key(path, "b")
    assert read_keys(path).entries == ()


def test_changes_at_the_same_time_do_not_undo_each_other(tmp_path):
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(path, entry(f"k{n}", f"t{n}"))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.name for one in read_keys(path).entries) == [f"k{n}" for n in range(8)]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, entry())
    before = path.read_bytes()
    with pytest.raises(UsageError):
        change_keys(path, lambda entries: [*entries, *entries])
    assert path.read_bytes() == before


def test_a_changed_file_is_read_again_and_a_broken_one_keeps_the_old_keys(tmp_path, caplog):
    path, now = tmp_path / "keys.json", [0.0]
    add_key(path, entry("a", "one"))
    followed = KeyFile(path, clock=lambda: now[0])
    add_key(path, entry("b", "two"))
    assert refused(followed.keys, "two", None, "infer").status == 401  # looked at most once a second
    now[0] = 1.5
    assert followed.keys.authorize("two", None, "infer") == "b"
    file_of(path, '{"keys": [{"name": "secret-looking"')
    now[0] = 3.0
    with caplog.at_level(logging.ERROR, "fettle.serve"):
        for _ in range(3):
            assert followed.keys.authorize("one", None, "infer") == "a"
            now[0] += 1.5
    assert sum("stay as they were" in record.message for record in caplog.records) == 1
    path.unlink()
    now[0] += 1.5
    assert followed.keys.authorize("one", None, "infer") == "a"
    add_key(path, entry("c", "three"))
    now[0] += 1.5
    assert followed.keys.authorize("three", None, "infer") == "c"
    assert refused(followed.keys, "one", None, "infer").status == 401


# A server


@pytest.fixture(scope="module")
def keyed(kit, shelf_root, tmp_path_factory):
    """A server that asks for keys, shared by the tests that change none."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    for name, models, actions in (
        ("all", "*", ["infer", "read"]), ("mine", ["tiny"], ["infer"]), ("other", ["other"], ["infer", "read"]),
        ("reader", "*", ["read"]),
    ):  # fmt: skip
        add_key(path, entry(name, f"key-{name}", models, actions))
    server = kit.Running(kit.Shelf(shelf_root), keys=path, access_log=True).wait_ready()
    with server.client() as client:
        yield client
    server.stop()


def bearer(name):
    return {"authorization": f"Bearer key-{name}"}


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/health/live", "/health/ready"])
def test_probes_need_no_key(keyed, path):
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"), ("GET", "/v2/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v2/models/tiny"),
        ("GET", "/v2/models/tiny/ready"), ("GET", "/v2/models/tiny/versions/1"), ("POST", INFER), ("POST", "/predict"),
        ("GET", "/v2/models/none"), ("GET", "/nothing"), ("DELETE", "/health"), ("POST", "/v2/repository/index"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), {"x-api-key": "key-al"}, {"authorization": "Basic key-all"}], ids=range(4)
)
def test_all_else_is_401_without_a_key_whether_it_exists_or_not(keyed, kit, method, path, headers):
    response = keyed.request(method, path, headers=headers)
    error = kit.error_of(response, 401)
    assert response.headers["www-authenticate"] == 'Bearer realm="fettle"'
    assert "key-" not in error
    assert "tiny" not in error


def test_keys_open_what_they_are_good_for(keyed, kit):
    body = kit.body_of()
    for headers in (bearer("all"), {"x-api-key": "key-all"}, bearer("mine")):
        assert keyed.post(INFER, content=body, headers={**JSON, **headers}).status_code == 200
    for path in ("/v2", "/health", "/metrics", "/v2/models/tiny", "/v2/models/tiny/ready"):
        assert keyed.get(path, headers=bearer("all")).status_code == 200
        assert keyed.get(path, headers=bearer("reader")).status_code == 200
        kit.error_of(keyed.get(path, headers=bearer("mine")), 403)
    assert "tiny" in kit.error_of(keyed.post(INFER, content=body, headers={**JSON, **bearer("other")}), 403)
    kit.error_of(keyed.get("/v2/models/tiny", headers=bearer("other")), 403)
    kit.error_of(keyed.post("/predict", json={}, headers=bearer("other")), 403)
    kit.error_of(keyed.post(INFER, content=body, headers={**JSON, **bearer("reader")}), 403)


def test_a_key_for_some_models_is_not_told_the_names_of_others(keyed, kit):
    assert "tiny" not in kit.error_of(keyed.get("/v2/models/none", headers=bearer("other")), 404)
    assert "tiny" in kit.error_of(keyed.get("/v2/models/none", headers=bearer("all")), 404)


def test_the_refusal_comes_before_the_body_is_read(keyed, kit):
    huge = keyed.post(INFER, content=b"x" * 8_000_000, headers=JSON)
    kit.error_of(huge, 401)


def test_the_access_log_has_the_keys_name_and_never_the_key(keyed, caplog):
    with caplog.at_level(logging.INFO, "fettle.serve"):
        keyed.get("/health", headers={**bearer("all"), "x-request-id": "with"})
        keyed.get("/health", headers={**bearer("nobody-has-this"), "x-request-id": "without"})
        keyed.get("/v2", headers={**bearer("mine"), "x-request-id": "wrong-scope"})
    said = [record.about for record in caplog.records if "status" in getattr(record, "about", {})]
    assert {one["request_id"]: one.get("key") for one in said} == {
        "with": "all",
        "without": None,
        "wrong-scope": "mine",
    }
    assert "key-" not in caplog.text + str(said)
    assert "nobody-has-this" not in caplog.text + str(said)


def test_a_key_that_is_taken_back_stops_working_while_the_server_runs(start, shelf, tmp_path, kit):
    path = tmp_path / "keys.json"
    add_key(path, entry("a", "one", actions=["read"]))
    with start(shelf, keys=path).wait_ready().client() as client:
        assert client.get("/v2", headers={"x-api-key": "one"}).status_code == 200
        remove_key(path, "a")
        kit.until(lambda: client.get("/v2", headers={"x-api-key": "one"}).status_code == 401)


def test_a_server_whose_key_file_is_unusable_does_not_start(tmp_path, shelf):
    from fettle.serve.server import serve

    with pytest.raises(UsageError, match="cannot be read"):
        serve(shelf, options=ServeOptions(port=0, keys=tmp_path / "none.json"))
    file_of(tmp_path / "keys.json", {"keys": [ENTRY]})
    with pytest.raises(UsageError, match="'admin'"):
        serve(shelf, options=ServeOptions(port=0, keys=tmp_path / "keys.json", admin_port=0))
    with pytest.raises(UsageError, match="admin_port needs a key file"):
        ServeOptions(admin_port=0)


def test_a_server_open_to_others_without_keys_warns(start, shelf, caplog):
    with caplog.at_level(logging.WARNING, "fettle.serve"):
        start(shelf, host="0.0.0.0").wait_ready()
    assert "no API keys" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fettle.serve"):
        start(shelf).wait_ready()
    assert "no API keys" not in caplog.text
