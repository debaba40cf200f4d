"""From built artifacts to candidates with full reports: latency side by side, size, agreement, the final split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fettle.core.artifact import Artifact
from fettle.core.data import Split
from fettle.core.errors import CorruptArtifact, DataError, FettleError
from fettle.core.report import Measurement, Report
from fettle.core.runner import Runner
from fettle.core.signature import Array
from fettle.evaluate.comparison import Candidate
from fettle.evaluate.footprint import measure_size
from fettle.evaluate.latency import Latency, measure_latency
from fettle.evaluate.metric import hits, measure_metric
from fettle.evaluate.paired import compare_paired
from fettle.evaluate.parity import compare_outputs
from fettle.stages.build import Built, answer, first_rows
from fettle.stages.task import Task

_LATENCY_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate with its artifact. The digest is the artifact's."""

    candidate: Candidate
    artifact: Artifact

    @property
    def runtime(self) -> str:
        """The engine's name."""
        return self.candidate.runtime

    @property
    def precision(self) -> str:
        """ "float", "int8", ..."""
        return self.candidate.precision

    @property
    def report(self) -> Report:
        """All that was measured."""
        return self.candidate.report

    @property
    def version(self) -> int | None:
        """Its number in the registry, or None."""
        return self.candidate.version

    def load(self, *, threads: int = 1) -> Runner:
        """A runner from numpy arrays to numpy arrays.

        Raises CorruptArtifact where a later run of the same name has put another model into the folder.
        """
        found = Artifact.open(self.artifact.root)
        if found.digest != self.artifact.digest:
            raise CorruptArtifact(
                f"{found.root} must hold artifact {self.artifact.digest[:12]}, got {found.digest[:12]}: a later run "
                "replaced it; register what you want to keep"
            )
        return found.load(threads=threads)


def measure(task: Task, built: Mapping[str, Built], *, baseline: str) -> tuple[list[Trial], dict[str, str]]:
    """Time all in interleaved rounds and complete their reports; return the trials, and why others failed.

    Raises FettleError where the baseline itself cannot be timed, since every figure is against it.
    """
    rows = first_rows(task, task.batch)
    arrays = [rows[spec.name] for spec in task.signature.inputs]
    calls = {label: _call(entry.runner, arrays) for label, entry in built.items()}
    timed = measure_latency(
        calls,
        batch=task.batch,
        threads=task.threads,
        time_limit_s=min(_LATENCY_LIMIT_S, task.budget.time_limit_s or _LATENCY_LIMIT_S),
        seed=task.seed,
    )
    if isinstance(problem := timed[baseline], Exception):
        raise FettleError(f"the original must run, and in {baseline} it raised {first_line(problem)}") from problem
    trials, failures = [], {}
    for label, entry in built.items():
        latency = timed[label]
        if not isinstance(latency, Latency):
            failures[label] = first_line(latency)
            continue
        parity = compare_outputs(built[baseline].outputs, entry.outputs, classification=_is_classifier(task))
        measurements = (
            entry.metric,
            *latency.measurements(),
            measure_size(entry.artifact),
            *entry.numerics,
            *parity.measurements(task.validation.name),
        )
        trials.append(Trial(candidate=_candidate(label, entry.artifact, measurements), artifact=entry.artifact))
    return trials, failures


def final(task: Task, best: Trial, baseline: Trial, runners: Mapping[str, Runner]) -> tuple[Trial, Trial]:
    """The two with their metric taken on the test split, which is read here, once for each, and nowhere else.

    Without a test split they are returned as they are.
    """
    if task.test is None:
        return best, baseline
    metric, outputs, targets = _measured(task, task.test, runners[best.candidate.label])
    if best.artifact.digest == baseline.artifact.digest:
        baseline_metric, original = metric, outputs
    else:
        baseline_metric, original, _ = _measured(task, task.test, runners[baseline.candidate.label])
    parity = compare_outputs(original, outputs, classification=_is_classifier(task))
    extra = parity.measurements(task.test.name)
    if task.metric.name == "accuracy":
        extra += compare_paired(hits(original, targets), hits(outputs, targets)).measurements(task.test.name)
    return _with_metric(best, metric, extra), _with_metric(baseline, baseline_metric, ())


def _measured(task: Task, split: Split, runner: Runner) -> tuple[Measurement, Array, Array]:
    """The metric, the outputs and the targets of one pass."""
    seen: list[Array] = []

    def prepare(outputs: Array, targets: Array) -> tuple[Array, ...]:
        seen.append(targets)  # so that comparing two models row by row needs no pass of its own
        return task.metric.prepare(outputs, targets)

    metric, outputs = measure_metric(
        partial(answer, runner), split, replace(task.metric, prepare=prepare), seed=task.seed
    )
    return metric, outputs, seen[0]


def _with_metric(trial: Trial, metric: Measurement, extra: tuple[Measurement, ...]) -> Trial:
    replaced = {measurement.name for measurement in extra} | {metric.name}
    kept = tuple(each for each in trial.report.measurements if each.name not in replaced)
    report = replace(trial.report, measurements=(metric, *kept, *extra))
    return replace(trial, candidate=replace(trial.candidate, report=report))


def _candidate(label: str, artifact: Artifact, measurements: tuple[Measurement, ...]) -> Candidate:
    manifest = artifact.manifest
    return Candidate(
        label=label,
        digest=artifact.digest,
        runtime=manifest.runtime,
        precision=manifest.precision,
        steps=tuple(step.name for step in manifest.recipe.steps),
        report=Report(subject=artifact.digest, measurements=measurements, notes=manifest.left_float),
    )


def _call(runner: Runner, arrays: list[Array]) -> Callable[[], object]:
    return lambda: runner(*arrays)


def _is_classifier(task: Task) -> bool:
    return is_classification(task.metric.name, task.signature.classes)


def is_classification(metric: str, classes: tuple[str, ...]) -> bool:
    """Whether the outputs are scores of classes, as far as the task tells."""
    return bool(classes) or metric in ("accuracy", "top5_accuracy", "f1_macro")


def first_line(problem: BaseException) -> str:
    """One line that names a failure."""
    if isinstance(problem, DataError):
        return str(problem)
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"
