"""What every benchmark shares: options, peers in environments of their own, interleaved timing, one last line.

A benchmark builds a `Result` and ends with `raise SystemExit(finish(result, options))`:

    options = parse_options(__doc__)
    timings = interleave({"ours": ours, "theirs": theirs}, rounds=5 if options.quick else 25)
    claim = Claim("ours is as fast", holds=ratio <= 1.05, figures=f"{ratio:.2f} times the peer's latency")
    raise SystemExit(finish(Result("speed", tables=(table,), claims=(claim,)), options))

`readme_tables.py` copies the tables of `results/NAME.json` between the README's markers `<!-- NAME -->`.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".peers"
REQUIREMENTS = ROOT / "benchmarks" / "peers"
INSTALL_LIMIT_S = 900
VERSIONS = ("torch", "onnxruntime", "openvino", "numpy", "fettle-ml")


@dataclass(frozen=True, slots=True)
class Options:
    """quick: the same code on less work, two minutes or less. json: where the result is written, if anywhere."""

    quick: bool
    json: Path | None


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """`--quick` and `--json PATH`, as every benchmark takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same code on less work, two minutes or less")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here")
    return parser


def parse_options(description: str | None, *, arguments: Sequence[str] | None = None) -> Options:
    """What `make_parser` takes and no more; `arguments` defaults to the command line's."""
    parsed = make_parser(description).parse_args(arguments)
    return Options(quick=parsed.quick, json=parsed.json)


class PeerMissing(Exception):
    """A peer that cannot be installed or run here. The benchmark names it with this reason and goes on."""


def peer_python(name: str) -> Path:
    """The interpreter of `.peers/NAME`, a virtual environment made from `peers/NAME.txt` on first use.

    It is made again when the requirements change. Raises PeerMissing with pip's last words.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = PEERS / name
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    with _locked(PEERS / f"{name}.lock"):
        wanted = requirements.read_text(encoding="utf-8")
        # Written last, so that an interrupted installation is not taken for a whole one.
        if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
            installed.unlink(missing_ok=True)
            _run_peer([sys.executable, "-m", "venv", "--clear", str(folder)], limit_s=INSTALL_LIMIT_S)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run_peer([*pip, "--requirement", str(requirements)], limit_s=INSTALL_LIMIT_S)
            installed.write_text(wanted, encoding="utf-8")
    return python


def run_peer(name: str, script: Path, arguments: Sequence[str], *, limit_s: float = 600) -> str:
    """Run a script with the peer's interpreter and return what it printed. Raises PeerMissing where it fails."""
    return _run_peer([str(peer_python(name)), str(script), *arguments], limit_s=limit_s)


def _run_peer(command: Sequence[str], *, limit_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise PeerMissing(f"{Path(command[0]).name} could not run: {problem}") from None
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise PeerMissing(f"{' '.join(command[1:4])}: {words[-1].strip()}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two benchmarks do not build one environment at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one call over all rounds: the median of each round's median, and the quartiles of those."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    calls: int


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, turn_s: float = 0.1, warmup: int = 3
) -> dict[str, Timing]:
    """Time every call in turns, round after round, so that a change of the machine's speed hits all of them.

    Each turn makes `warmup` calls that are not counted and then as many as fit in `turn_s` seconds, at least three.
    The order rotates from round to round: nobody always runs after the heaviest.
    """
    names = list(calls)
    medians: dict[str, list[float]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 0)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples_s = _turn(calls[name], turn_s=turn_s, warmup=warmup)
            medians[name].append(statistics.median(samples_s) * 1e3)
            counts[name] += len(samples_s)
    return {name: _timing(medians[name], counts[name]) for name in names}


def _turn(call: Callable[[], object], *, turn_s: float, warmup: int) -> list[float]:
    for _ in range(warmup):
        call()
    samples_s: list[float] = []
    end = time.perf_counter() + turn_s
    while len(samples_s) < 3 or time.perf_counter() < end:
        before = time.perf_counter()
        call()
        samples_s.append(time.perf_counter() - before)
    return samples_s


def _timing(medians_ms: list[float], calls: int) -> Timing:
    if len(medians_ms) < 2:
        low = high = medians_ms[0]
    else:
        low, _, high = statistics.quantiles(medians_ms, n=4, method="inclusive")
    return Timing(statistics.median(medians_ms), low, high, len(medians_ms), calls)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are to be read; numbers are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row must have {len(self.columns)} cells, got {row}")

    def text(self) -> str:
        """For a terminal."""
        widths = [max(len(cell) for cell in column) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.columns, tuple("-" * width for width in widths), *self.rows]
        body = ["  ".join(_aligned(cell, width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *(line.rstrip() for line in body)])

    def markdown(self) -> str:
        """For the README."""
        rules = tuple("---:" if all(map(_numeric, column)) else "---" for column in zip(*self.rows, strict=True))
        lines = [self.columns, rules or ("---",) * len(self.columns), *self.rows]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *body])


def _aligned(cell: str, width: int) -> str:
    return cell.rjust(width) if _numeric(cell) else cell.ljust(width)


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "+", "–")


@dataclass(frozen=True, slots=True)
class Claim:
    """One promise, whether it was kept, and the numbers that decide."""

    statement: str
    holds: bool
    figures: str


@dataclass(frozen=True, slots=True)
class Result:
    """All that a benchmark found. details: raw numbers as JSON; missing: peers that could not run, with the reason."""

    benchmark: str
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    details: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Every claim holds, and there is one."""
        return bool(self.claims) and all(claim.holds for claim in self.claims)

    def verdict(self) -> str:
        """The last line."""
        figures = "; ".join(claim.figures for claim in self.claims) or "nothing was measured"
        return f"CLAIM {'holds' if self.holds else 'falls short'}: {figures}"


def finish(result: Result, options: Options) -> int:
    """Print the tables, the missing peers and the last line, write the JSON, and return the exit code."""
    for table in result.tables:
        print(table.text(), end="\n\n")
    for name, reason in result.missing.items():
        print(f"missing: {name}: {reason}")
    for claim in result.claims:
        print(f"{'yes' if claim.holds else 'NO '}  {claim.statement}: {claim.figures}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_json(result, quick=options.quick), indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(result.verdict(), flush=True)
    return 0 if result.holds else 1


def to_json(result: Result, *, quick: bool) -> dict[str, Any]:
    """The result with the time and the machine it was found on."""
    return {
        "benchmark": result.benchmark,
        "quick": quick,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        **{key: value for key, value in asdict(result).items() if key != "benchmark"},
        "verdict": result.verdict(),
    }


def describe_machine() -> dict[str, str]:
    """Processor, cores, load and the versions that matter."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    load = f"{os.getloadavg()[0]:.2f}"
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load": load,
        "python": platform.python_version(),
    } | (versions)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
