"""Every option survives the way through a file, and what a file cannot mean is named with its key."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.serve.config import TrafficWords, assigned, read_settings, resolve, settings_of
from fettle.serve.options import ServeOptions

FOLDER = Path("/srv/fettle")
HINTS = {**get_type_hints(TrafficWords), **get_type_hints(ServeOptions)}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).map(FOLDER.joinpath)


def values_of(name, hint):
    """In range, whatever the others are."""
    if get_origin(hint) is UnionType:
        (kind,) = (one for one in get_args(hint) if one is not type(None))
        return st.none() | values_of(name, kind)
    if get_origin(hint) is tuple:
        return st.lists(WORDS, max_size=3).map(tuple)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if name.endswith("port"):
        return st.integers(0, 65535)
    lowest = 1000 if name == "max_queue_rows" else 1
    return {
        bool: st.booleans(),
        int: st.integers(lowest, 1000 * lowest),
        float: st.floats(1e-9, 1e6) | st.integers(1, 10**6),
        str: WORDS,
        Path: PATHS,
    }[hint]


def all_values():
    return st.fixed_dictionaries({name: values_of(name, hint) for name, hint in HINTS.items()}).map(coherent)


def coherent(values):
    """What belongs together is given together."""
    if values["tls_certificate"] is None or values["tls_key"] is None:
        values |= dict.fromkeys(("tls_certificate", "tls_key", "tls_client_ca"))
    return values if values["keys"] is not None else {**values, "admin_port": None}


def toml_of(value):
    """The slow way to write a value. JSON's texts are TOML's, but for one control character."""
    if value is None:
        return "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_of, value))}]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else repr(value)


@given(all_values())
def test_every_option_survives_the_way_through_a_file_and_through_set(values):
    names = {field.name for field in (*fields(TrafficWords), *fields(ServeOptions))}
    assert set(values) == names
    text = "".join(f"{name} = {toml_of(value)}\n" for name, value in values.items())
    found = settings_of(text.encode(), folder=FOLDER, where="serve.toml")
    words, options = resolve(found)
    assert {**asdict(words), **asdict(options)} == values
    assert found == assigned(f"{name}={toml_of(value)}" for name, value in values.items())
    for name, hint in HINTS.items():
        if hint is float:
            assert type(found[name]) is float


def test_what_a_file_does_not_say_has_its_default():
    words, options = resolve(settings_of(b"models = ['a']\nworkers = 3", folder=FOLDER, where="serve.toml"))
    assert words == TrafficWords(models=("a",))
    assert options == ServeOptions(workers=3)
    assert resolve({}) == (TrafficWords(), ServeOptions())


GIVEN = {
    "1": 1, "-7": -7, "0.5": 0.5, "nan": float("nan"), "true": True, "false": False, '"2"': "2", "'a b'": "a b",
    "[]": [], '["a"]': ["a"], "[1]": [1], "[[]]": [[]], "{a = 1}": {"a": 1}, "2026-01-02": "a date",
    "07:32:00": "a time",
}  # fmt: skip


def takes(hint, value):
    """The rule, once more and in other words."""
    optional = get_origin(hint) is UnionType
    kinds = [one for one in get_args(hint) if one is not type(None)] if optional else [hint]
    if isinstance(value, bool):
        return kinds == [bool] or (optional and not value)
    if isinstance(value, int):
        return kinds[0] in (int, float)
    if isinstance(value, float):
        return kinds[0] is float
    if isinstance(value, list):
        return get_origin(kinds[0]) is tuple and all(isinstance(one, str) for one in value)
    if value in ("2", "a b"):
        return kinds[0] in (str, Path) or get_origin(kinds[0]) is Literal
    return False


@pytest.mark.parametrize("name", HINTS)
def test_each_option_takes_its_type_and_names_itself_where_it_gets_another(name):
    for text, value in GIVEN.items():
        content = f"{name} = {text}".encode()
        if takes(HINTS[name], value):
            assert set(settings_of(content, folder=FOLDER, where="here")) == {name}
        else:
            with pytest.raises(UsageError, match=rf"^here: {name} must be .+, got .+"):
                settings_of(content, folder=FOLDER, where="here")


HUGE = "0x1" + "0" * 5000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"wrokers = 2", "serve.toml: unknown key 'wrokers'; did you mean 'workers'? Known: access_log,"),
        (b"[tls]\ncertificate = 'a'", "unknown key 'tls'"),
        (b"port = true", "port must be a whole number, got true"),
        (b"workers = 2.0", "workers must be a whole number, got 2.0"),
        (b'workers = "2"', 'workers must be a whole number, got "2"'),
        (b'promise_s = "50 ms"', 'promise_s must be a number, or false for none, got "50 ms"'),
        (b"promise_s = true", "promise_s must be a number, or false for none, got true"),
        (b"keys = 1", "keys must be a path, or false for none, got 1"),
        (b'keys = ""', 'keys must be a path, or false for none, got ""'),
        (b'keys = "a\\u0000b"', "keys must be a path, or false for none"),
        (b'host = "a\\u0000b"', "host must be a text"),
        (b"host = false", "host must be a text, got false"),
        (b'models = "digits"', 'models must be a list, as ["a", "b"], got "digits"'),
        (b"models = ['digits', 3]", "models must be a list, each of it a text, got 3"),
        (b"trace = 1", "trace must be true or false, got 1"),
        (b"host = 2026-01-02", "host must be a text, got 2026-01-02"),
        (b"host = {}", "host must be a text, got a table"),
        (f"workers = {HUGE}".encode(), "workers must be a whole number, got one of more than 63 bits"),
        (f"grace_s = {HUGE}".encode(), "grace_s must be a number, got one of more than 63 bits"),
        (b"workers = " + b"9" * 5000, "serve.toml: not valid TOML"),
        (b"port = 1\nworkers = \n", "serve.toml: not valid TOML: Invalid value (at line 2, column 11)"),
        (b"port = 1\nport = 2\n", "not valid TOML: Cannot overwrite a value (at line 2"),
        (b'port = 1\n\nhost = "\xff"', "not valid TOML: not UTF-8 (at line 3)"),
        (b"models = " + b"[" * 100_000, "serve.toml: not valid TOML"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_a_file_cannot_mean_is_one_line_that_names_it(content, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        settings_of(content, folder=FOLDER, where="serve.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_no_file_does_anything_but_give_settings_or_a_usage_error(content):
    with suppress(UsageError):
        assert set(settings_of(content, folder=FOLDER, where="serve.toml")) <= set(HINTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workers = 0", "workers must be at least 1, got 0"),
        ("port = 65536", "port must be 0 to 65535, got 65536"),
        ("poll_s = inf", "poll_s must be a positive number of seconds, at most 1000000, got inf"),
        ("log_format = 'xml'", "log_format must be one of text, json, got 'xml'"),
        ("tls_key = 'key.pem'", "tls_certificate and tls_key must be given together"),
        ("max_queue_rows = 1", "max_queue_rows must be at least max_batch_rows, got 1 < 32"),
    ],
)
def test_a_value_out_of_range_is_refused_in_the_words_of_the_options(text, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        resolve(settings_of(text.encode(), folder=FOLDER, where="serve.toml"))


def test_paths_are_relative_to_the_files_folder(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "serve.toml"
    path.write_text('keys = "keys.json"\nobservations = "../log/{model}"\ntls_key = "/etc/key.pem"\n')
    for given_as in (path, Path("conf/serve.toml")):
        monkeypatch.chdir(tmp_path)
        assert read_settings(given_as) == {
            "keys": tmp_path / "conf" / "keys.json",
            "observations": tmp_path / "conf" / "../log/{model}",
            "tls_key": Path("/etc/key.pem"),
        }


@pytest.mark.parametrize(("name", "words"), [("none.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, words):
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / name} cannot be read: {words}")):
        read_settings(tmp_path / name)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("tls_certificate=cert.pem", {"tls_certificate": Path("cert.pem")}),
        ("tls_certificate=a=b.pem", {"tls_certificate": Path("a=b.pem")}),
        ("host=0.0.0.0", {"host": "0.0.0.0"}),
        ("host=::", {"host": "::"}),
        ('host="::"', {"host": "::"}),
        ("host=", {"host": ""}),
        ("host=a\nworkers=2", {"host": "a\nworkers=2"}),
        ("host='a'\nworkers=2", {"host": "'a'\nworkers=2"}),
        ("sticky=header:X-User-Id", {"sticky": "header:X-User-Id"}),
        ("observations=false", {"observations": None}),
        ("observations=log/{model}", {"observations": Path("log/{model}")}),
        ("max_body_bytes=1_000", {"max_body_bytes": 1000}),
        ("drain_timeout_s=60", {"drain_timeout_s": 60.0}),
        ('split=["a:1=10"]', {"split": ("a:1=10",)}),
    ],
)
def test_set_takes_toml_or_a_bare_text(word, found):
    assert assigned([word]) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workers"], "--set must be KEY=VALUE, as --set workers=2, got 'workers'"),
        (["=2"], "--set: unknown key ''"),
        (["wokers=2"], "--set: unknown key 'wokers'; did you mean 'workers'?"),
        (["workers=two"], '--set: workers must be a whole number, got "two"'),
        (["trace=yes"], '--set: trace must be true or false, got "yes"'),
        (["admin_names=[a]"], '--set: admin_names must be a list, as ["a", "b"], got "[a]"'),
        (["workers=1", "workers=2"], "--set workers is given twice"),
        (["keys="], "--set: keys must be a path"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_meant(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        assigned(words)
