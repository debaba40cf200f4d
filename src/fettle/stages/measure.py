"""From built artifacts to candidates with full reports: latency side by side, size, agreement, the final split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fettle.core.artifact import Artifact
from fettle.core.errors import DataError
from fettle.core.report import Measurement, Report
from fettle.core.runner import Runner
from fettle.core.signature import Array
from fettle.evaluate.comparison import Candidate
from fettle.evaluate.footprint import measure_size
from fettle.evaluate.latency import Latency, measure_latency
from fettle.evaluate.metric import hits, measure_metric
from fettle.evaluate.paired import compare_paired
from fettle.evaluate.parity import compare_outputs
from fettle.stages.build import Built, first_rows
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
        """A runner from numpy arrays to numpy arrays."""
        return self.artifact.load(threads=threads)


def measure(task: Task, built: Mapping[str, Built], *, baseline: str) -> tuple[list[Trial], dict[str, str]]:
    """Time all in interleaved rounds and complete their reports; return the trials, and a reason for each failed one."""
    rows = first_rows(task, task.batch)
    arrays = [rows[spec.name] for spec in task.signature.inputs]
    calls = {label: _call(entry.runner, arrays) for label, entry in built.items()}
    timed = measure_latency(
        calls, batch=task.batch, threads=task.threads, time_limit_s=_LATENCY_LIMIT_S, seed=task.seed
    )
    trials, failures = [], {}
    for label, entry in built.items():
        latency = timed[label]
        if not isinstance(latency, Latency):
            failures[label] = f"{type(latency).__name__}: {latency}"
            continue
        parity = compare_outputs(built[baseline].outputs, entry.outputs, classification=_is_classifier(task))
        measurements = (
            entry.metric,
            *latency.measurements(),
            measure_size(entry.artifact),
            *parity.measurements(task.validation.name),
        )
        trials.append(Trial(candidate=_candidate(label, entry.artifact, measurements), artifact=entry.artifact))
    return trials, failures


def final(task: Task, best: Trial, baseline: Trial, runners: Mapping[str, Runner]) -> tuple[Trial, Trial]:
    """The two with their metric taken on the test split, which is read here and nowhere else.

    Without a test split they are returned as they are.
    """
    if task.test is None:
        return best, baseline
    taken: dict[str, tuple[Measurement, Array]] = {}
    for trial in (best, baseline):
        runner = runners[trial.candidate.label]
        taken[trial.artifact.digest] = measure_metric(
            lambda inputs, runner=runner: runner(*inputs),  # type: ignore[misc]
            task.test,
            task.metric,
            seed=task.seed,
        )
    outputs = {digest: answer for digest, (_, answer) in taken.items()}
    extra = _against_baseline(task, outputs[best.artifact.digest], outputs[baseline.artifact.digest])
    return (
        _with_metric(best, taken[best.artifact.digest][0], extra),
        _with_metric(baseline, taken[baseline.artifact.digest][0], ()),
    )


def _against_baseline(task: Task, outputs: Array, original: Array) -> tuple[Measurement, ...]:
    assert task.test is not None
    parity = compare_outputs(original, outputs, classification=_is_classifier(task))
    found = parity.measurements(task.test.name)
    if task.metric.name != "accuracy":
        return found
    targets = np.concatenate([targets for _, targets in task.test])
    return found + compare_paired(hits(original, targets), hits(outputs, targets)).measurements(task.test.name)


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


def _call(runner: Runner, arrays: list[Array]):  # type: ignore[no-untyped-def]
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
