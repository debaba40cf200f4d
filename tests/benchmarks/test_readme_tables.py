import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def readme_tables() -> ModuleType:
    return importlib.import_module("readme_tables")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, "speed", result("ours", "1.5"))
    return folder


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("# Before\n\n<!-- speed -->\nYESTERDAY\n<!-- /speed -->\n\nAfter\n", encoding="utf-8")
    return path


def result(system: str, latency: str, **changes: Any) -> dict[str, Any]:
    table = {"title": "Speed", "columns": ["system", "ms"], "rows": [[system, latency]]}
    found = {
        "tables": [table],
        "missing": {},
        "verdict": f"CLAIM holds: {latency} ms",
        "machine": {"processor": "Zen", "cores": "2", "load": "0.5", "torch": "2.13.0"},
        "time": "2026-01-02T03:04:05+00:00",
        "quick": False,
    }
    return found | changes


def write(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def run(module: ModuleType, readme: Path, results: Path, *flags: str) -> int:
    code = module.main(["--readme", str(readme), "--results", str(results), *flags])
    assert isinstance(code, int)
    return code


def test_tables_are_written_between_the_markers_and_nothing_else_changes(
    readme_tables: ModuleType, readme: Path, results: Path
) -> None:
    assert run(readme_tables, readme, results) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Before\n\n<!-- speed -->\n**Speed**\n")
    assert text.endswith("\n<!-- /speed -->\n\nAfter\n")
    assert "| ours | 1.5 |" in text
    assert "CLAIM holds: 1.5 ms" in text
    assert "YESTERDAY" not in text


def test_check_passes_once_the_readme_is_fresh(readme_tables: ModuleType, readme: Path, results: Path) -> None:
    assert run(readme_tables, readme, results, "--check") == 1
    assert "YESTERDAY" in readme.read_text(encoding="utf-8")
    assert run(readme_tables, readme, results) == 0
    assert run(readme_tables, readme, results, "--check") == 0


def test_check_notices_a_new_result(
    readme_tables: ModuleType, readme: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(readme_tables, readme, results)
    write(results, "speed", result("ours", "1.6"))
    assert run(readme_tables, readme, results, "--check") == 1
    assert "is stale: run python benchmarks/readme_tables.py" in capsys.readouterr().err


def test_writing_twice_changes_nothing(readme_tables: ModuleType, readme: Path, results: Path) -> None:
    run(readme_tables, readme, results)
    first = readme.read_bytes()
    run(readme_tables, readme, results)
    assert readme.read_bytes() == first


def test_several_benchmarks_each_fill_their_own_place(readme_tables: ModuleType, readme: Path, results: Path) -> None:
    write(results, "size", result("small", "7"))
    readme.write_text("<!-- size -->\n<!-- /size -->\nbetween\n<!-- speed --><!-- /speed -->", encoding="utf-8")
    assert run(readme_tables, readme, results) == 0
    size, speed = readme.read_text(encoding="utf-8").split("between")
    assert "| small | 7 |" in size
    assert "| ours | 1.5 |" in speed


def test_a_readme_without_markers_is_left_alone(readme_tables: ModuleType, readme: Path, results: Path) -> None:
    readme.write_text("nothing to fill", encoding="utf-8")
    assert run(readme_tables, readme, results, "--check") == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"missing": {"NNCF": "no network"}}, "Missing: NNCF (no network)."),
        ({"quick": True}, "A quick run, not a full one."),
        ({"verdict": "CLAIM falls short: 2 ms"}, "CLAIM falls short: 2 ms"),
        ({}, "Measured 2026-01-02 on Zen, 2 cores; torch 2.13.0."),
    ],
)
def test_what_a_reader_must_know_is_said(readme_tables: ModuleType, changes: dict[str, Any], sentence: str) -> None:
    assert sentence in readme_tables.render(result("ours", "1.5", **changes))


@pytest.mark.parametrize(
    "text",
    ["<!-- speed -->", "<!-- /speed -->", "<!-- speed --><!-- speed -->", "<!-- speed --><!-- /size -->",
     "<!-- speed --><!-- /speed --><!-- speed -->", "<!-- /speed --><!-- speed -->"],
)  # fmt: skip
def test_markers_out_of_turn_are_refused_and_the_readme_is_kept(
    readme_tables: ModuleType, readme: Path, results: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    readme.write_text(text, encoding="utf-8")
    assert run(readme_tables, readme, results) == 1
    assert "opened and closed in turn" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"tables": []}'])
def test_a_result_that_is_none_is_refused(
    readme_tables: ModuleType, readme: Path, results: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (results / "speed.json").write_text(content, encoding="utf-8")
    assert run(readme_tables, readme, results) == 1
    assert "speed.json" in capsys.readouterr().err
    assert "YESTERDAY" in readme.read_text(encoding="utf-8")


def test_a_missing_result_says_how_to_make_it(
    readme_tables: ModuleType, readme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(readme_tables, readme, tmp_path) == 1
    assert "run python benchmarks/speed.py --json" in capsys.readouterr().err


def test_a_missing_readme_is_named(
    readme_tables: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(readme_tables, tmp_path / "absent.md", results) == 1
    assert "absent.md does not exist" in capsys.readouterr().err


def test_the_docstring_of_render_is_true(readme_tables: ModuleType) -> None:
    doctest = importlib.import_module("doctest")
    assert doctest.testmod(readme_tables).failed == 0
