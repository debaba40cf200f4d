"""What the pages say is run: the listings of README and tutorial; and every `fettle ...` that a page names exists."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from fettle.cli import app
from fettle.core import codec
from fettle.core.project import ProjectFile
from fettle.serve.config import assigned, resolve, settings_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(fettle(?: [^`\n]*)?)`")
MARKER = re.compile(r"<!-- (?P<name>\w+) -->\n(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)
NEEDS_NETWORK = ("make", "pip", "git")


class Block(NamedTuple):
    """A fenced listing."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(found["language"], found["text"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `fettle ...`, in code spans and in listings of commands."""
    text = page.read_text(encoding="utf-8")
    for span in SPAN.finditer(BLOCK.sub("", text)):
        yield shlex.split(span[1])
    for block in blocks(page):
        if block.language in ("sh", ""):
            for line in block.text.splitlines():
                if line.startswith("fettle "):
                    yield shlex.split(re.split(r" +(?:\||&|#)", line)[0])


NAMED = [pytest.param(words, id=f"{page.name}:{' '.join(words)}") for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", NAMED)
def test_every_command_a_page_names_exists(words):
    command = typer.main.get_command(app)
    rest = words[1:]
    while rest and getattr(command, "commands", None):
        assert rest[0] in command.commands, f"no command {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert options <= known | {"--help"}, f"{' '.join(words)}: unknown option"
    assigned(value for word, value in pairwise(rest) if word == "--set" and "=" in value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{target} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_on_pages_are_valid(page):
    for block in blocks(page):
        if block.language == "toml" and block.text.startswith("# serve.toml"):
            resolve(settings_of(block.text.encode(), folder=ROOT, where=str(page)))
        elif block.language == "toml":
            codec.from_json(ProjectFile, tomllib.loads(block.text), where=str(page))


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 300_000, picture


def test_the_readme_shows_the_results_that_are_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("harness", "readme_tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from readme_tables import json_of, render

    results = ROOT / "benchmarks" / "results"
    for found in MARKER.finditer(README.read_text(encoding="utf-8")):
        if (results / f"{found['name']}.json").exists():
            want = render(json_of(results / f"{found['name']}.json"))
            assert found["body"].strip() == want, f"{found['name']} is stale: run python benchmarks/readme_tables.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the pages call curl")
@pytest.mark.parametrize(
    ("page", "promised"),
    [
        (
            README,
            [
                "everything is as it was written",
                '"class":"five"',
                '"model_name":"digits"',
                "are needed to rule out drift",
            ],
        ),
        (TUTORIAL, ["pump:1: no drift", "pump:1: drift", "exit code 1", "everything is as it was written"]),
    ],
    ids=["readme", "tutorial"],
)
def test_a_page_can_be_followed_to_the_letter(page, promised, tmp_path):
    for name in ("src", "docs", "examples") if page == README else ():
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "page.sh").write_text(script_of(page, tmp_path, port=free_port()), encoding="utf-8")
    done = subprocess.run(
        ["bash", "page.sh"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for words in promised:
        assert words in done.stdout, f"{words!r} not in\n{done.stdout}\n{done.stderr}"


def script_of(page: Path, folder: Path, *, port: int) -> str:
    """One script that does what the page says; a listing that begins with `# NAME.EXT` becomes that file."""
    # A page whose command fails must not leave its server behind.
    lines = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, block in enumerate(blocks(page)):
        text = block.text.replace("8080", str(port))
        title = re.match(r"# (\w+\.\w+)\n", text)
        if title or block.language == "python":
            name = title[1] if title else f"listing{number}.py"
            (folder / name).write_text(text, encoding="utf-8")
        if block.language == "python" and not title:
            lines.append(f"python {name}")
        elif block.language == "sh":
            lines += [line for line in text.splitlines() if not line.startswith(NEEDS_NETWORK)]
    return "\n".join([*lines, ""])


def environment() -> dict[str, str]:
    """A newcomer's: the installed commands first, no state folder named, no proxy between us and loopback."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FETTLE_HOME", "PYTHONPATH")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "NO_PROXY": "*", "no_proxy": "*"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
