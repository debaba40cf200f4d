"""The verdict on a window: drift, no drift, or not enough data to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fettle.core.errors import MonitorError, UsageError
from fettle.core.report import Measurement, Report
from fettle.core.signature import Array
from fettle.core.statistics import STATISTICS
from fettle.monitor.correction import holm
from fettle.monitor.drift._base import DriftTest
from fettle.monitor.drift.ks import KolmogorovSmirnov
from fettle.monitor.drift.psi import PopulationStability
from fettle.monitor.window import Window

Verdict = Literal["drift", "no drift", "not enough data"]

DEFAULT_TESTS: tuple[DriftTest, ...] = (KolmogorovSmirnov(), PopulationStability())


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One feature under one test.

    feature: "p0", "p1", ... for the probability of class 0, 1, ...; else a name of core.observation.STATISTICS.
    test, unit: the plug-in's name, such as "ks", and what its effect is called, such as "D".
    p_value: alone; corrected_p: after Holm over all findings.
    minimum: the smallest effect that counts. drifted: corrected_p <= alpha and effect >= minimum.
    """

    feature: str
    test: str
    unit: str
    p_value: float
    corrected_p: float
    effect: float
    minimum: float
    statistic: float
    null_mean: float
    drifted: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What one test could see in a window of this size, at the hardest corrected level alpha/K.

    minimum: the smallest effect that counts; detectable: the smallest true effect rejected with the stated power,
        None where no effect is.
    needed: rows a window must have for `minimum` to be detectable; None where the reference is too small for any.
    needed_reference: rows the reference must have for some window to do.
    """

    test: str
    unit: str
    minimum: float
    detectable: float | None
    needed: int | None
    needed_reference: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with everything it rests on.

    sentence: the verdict in plain language.
    alpha: at most this chance that a window without drift is judged "drift", over all findings of one look.
    power: the chance of rejecting a drift of the minimum effect that "no drift" promises.
    size, reference_size: rows of the window and of the reference.
    findings: drifted ones first, then by p-value.
    """

    digest: str
    verdict: Verdict
    sentence: str
    alpha: float
    power: float
    size: int
    reference_size: int
    findings: tuple[Finding, ...]
    sensitivities: tuple[Sensitivity, ...]

    @property
    def needed(self) -> int | None:
        """Rows a window must have before "no drift" can be said; None where the reference is too small for any."""
        return _largest([sensitivity.needed for sensitivity in self.sensitivities])

    @property
    def missing(self) -> int | None:
        """How many more rows that is; 0 where the window has enough."""
        return None if self.needed is None else max(0, self.needed - self.size)

    @property
    def drifted(self) -> tuple[str, ...]:
        """The features that drifted, most certain first, each once."""
        return tuple(dict.fromkeys(finding.feature for finding in self.findings if finding.drifted))

    def report(self) -> Report:
        """The same as measurements, for the renderer and the registry."""
        return Report(
            subject=self.digest,
            kind="drift",
            measurements=tuple(
                Measurement(
                    name=f"drift.{finding.test}.{finding.feature}",
                    value=finding.effect,
                    unit=finding.unit,
                    direction="lower",
                    n=self.size,
                    note=f"corrected p {finding.corrected_p:.2g}, counts from {finding.minimum:g}"
                    + (", drifted" if finding.drifted else ""),
                )
                for finding in self.findings
            ),
            notes=(self.sentence,),
        )


def judge(
    reference: Mapping[str, Array],
    window: Window,
    *,
    alpha: float = 0.001,
    power: float = 0.8,
    tests: Sequence[DriftTest] = DEFAULT_TESTS,
) -> Judgement:
    """Black-box shift detection: every softmax output and input statistic, tested and corrected together.

    A feature has drifted when a test rejects at level alpha after Holm's correction over all K pairs of feature and
    test, and the effect is at least that test's minimum. The verdict is "drift" where one has; "not enough data"
    where nothing is rejected and some test, at the hardest corrected level alpha/K, would reject its own minimum
    effect less often than `power`; else "no drift". An estimate scatters around the truth, so a true effect of
    exactly the minimum, once data is plenty, is judged drift about every other time.

    reference: "probabilities" (n, classes) and "statistics" (n, 5), as `Artifact.reference()` gives them.
    Rows count as independent: one client repeating one request looks like drift, because it is.

    Defined for every input: an empty window is "not enough data"; NaN is a value of its own; a constant reference
    column drifts when new values appear; one class gives a constant column. Raises MonitorError for an empty or
    incomplete reference and for another number of classes, UsageError for an alpha or power outside (0, 1).

    The measured rates of false alarms and of power are in benchmarks/results/drift_alarms.json.

    References: S. Rabanser, S. Günnemann, Z. Lipton, Failing Loudly, NeurIPS 2019; Z. Lipton, Y. Wang, A. Smola,
    Detecting and Correcting for Label Shift with Black Box Predictors, ICML 2018.
    """
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise UsageError(f"{name} must be between 0 and 1, got {value}")
    if not tests:
        raise UsageError("a verdict needs at least one drift test, got none")
    columns = _columns(reference, window)
    findings = _findings(columns, tests, alpha=alpha)
    sizes = (len(reference["probabilities"]), len(window))
    sensitivities = tuple(_sensitivity(test, *sizes, alpha=alpha / len(findings), power=power) for test in tests)
    verdict = _verdict(findings, sensitivities, size=len(window), alpha=alpha)
    return Judgement(
        digest=window.digest,
        verdict=verdict,
        sentence=_sentence(verdict, findings, sensitivities, sizes=sizes, alpha=alpha, power=power),
        alpha=alpha,
        power=power,
        size=len(window),
        reference_size=sizes[0],
        findings=findings,
        sensitivities=sensitivities,
    )


def _columns(reference: Mapping[str, Array], window: Window) -> dict[str, tuple[Array, Array]]:
    """Reference and window column of every feature, by name."""
    for key in ("probabilities", "statistics"):
        if key not in reference or reference[key].ndim != 2 or len(reference[key]) == 0:
            raise MonitorError(
                f"a reference needs '{key}' of shape (rows, columns), at least one row, "
                f"got {list(reference[key].shape) if key in reference else 'none'}: optimize the model again"
            )
    probabilities, statistics = reference["probabilities"], reference["statistics"]
    if len(probabilities) != len(statistics) or statistics.shape[1] != len(STATISTICS):
        raise MonitorError(
            f"a reference needs statistics of shape [{len(probabilities)}, {len(STATISTICS)}] beside its "
            f"probabilities, got {list(statistics.shape)}: optimize the model again"
        )
    seen = window.probabilities if len(window) else np.empty((0, probabilities.shape[1]), np.float32)
    if seen.shape[1] != probabilities.shape[1]:
        raise MonitorError(
            f"window and reference must have the same classes, got {seen.shape[1]} in the log and "
            f"{probabilities.shape[1]} in the artifact: was the log written by another model?"
        )
    columns = {f"p{i}": (probabilities[:, i], seen[:, i]) for i in range(probabilities.shape[1])}
    inputs = window.statistics if len(window) else np.empty((0, len(STATISTICS)), np.float32)
    return columns | {name: (statistics[:, i], inputs[:, i]) for i, name in enumerate(STATISTICS)}


def _findings(
    columns: Mapping[str, tuple[Array, Array]], tests: Sequence[DriftTest], *, alpha: float
) -> tuple[Finding, ...]:
    pairs = [(feature, test, test.compare(*columns[feature])) for feature in columns for test in tests]
    corrected = holm(np.array([comparison.p_value for _, _, comparison in pairs]))
    findings = [
        Finding(
            feature=feature,
            test=test.name,
            unit=test.unit,
            p_value=comparison.p_value,
            corrected_p=float(p),
            effect=comparison.effect,
            minimum=test.minimum,
            statistic=comparison.statistic,
            null_mean=comparison.null_mean,
            drifted=bool(p <= alpha and comparison.effect >= test.minimum),
            note=comparison.note,
        )
        for (feature, test, comparison), p in zip(pairs, corrected, strict=True)
    ]
    return tuple(sorted(findings, key=lambda finding: (not finding.drifted, finding.p_value, -finding.effect)))


def _sensitivity(test: DriftTest, reference_size: int, size: int, *, alpha: float, power: float) -> Sensitivity:
    detectable = test.detectable(reference_size, size, alpha=alpha, power=power)
    return Sensitivity(
        test=test.name,
        unit=test.unit,
        minimum=test.minimum,
        detectable=detectable if math.isfinite(detectable) else None,
        needed=test.needed(reference_size, alpha=alpha, power=power),
        needed_reference=test.needed_reference(alpha=alpha, power=power),
    )


def _verdict(findings: Sequence[Finding], sensitivities: Sequence[Sensitivity], *, size: int, alpha: float) -> Verdict:
    if any(finding.drifted for finding in findings):
        return "drift"
    blind = any(sensitivity.needed is None or size < sensitivity.needed for sensitivity in sensitivities)
    rejected = any(finding.corrected_p <= alpha for finding in findings)
    return "not enough data" if blind and not rejected else "no drift"


def _sentence(
    verdict: Verdict,
    findings: Sequence[Finding],
    sensitivities: Sequence[Sensitivity],
    *,
    sizes: tuple[int, int],
    alpha: float,
    power: float,
) -> str:
    reference_size, size = sizes
    rows = f"{size} prediction{'' if size == 1 else 's'}"
    if verdict == "drift":
        drifted = list(dict.fromkeys(finding.feature for finding in findings if finding.drifted))
        first = findings[0]
        return (
            f"Drift in {len(drifted)} of {len({finding.feature for finding in findings})} features over {rows}, "
            f"most surely in {first.feature}: {first.unit} {first.effect:.2f} where {first.minimum:g} counts, "
            f"corrected p {first.corrected_p:.1g}."
        )
    if verdict == "no drift":
        limits = [f"{s.unit} {max(s.minimum, s.detectable):.2g}" for s in sensitivities if s.detectable is not None]
        promise = f"; {' or '.join(limits)} would be significant with probability {power:g} or more" if limits else ""
        certain = [finding for finding in findings if finding.corrected_p <= alpha]
        small = f" {certain[0].feature} differs, by less than counts." if certain else ""
        return f"No drift over {rows}{promise}.{small}"
    needed = _largest([sensitivity.needed for sensitivity in sensitivities])
    if needed is None:
        least = _largest([sensitivity.needed_reference for sensitivity in sensitivities])
        return f"Not enough data: with {reference_size} reference rows no window is large enough; " + (
            f"a reference needs at least {least}." if least else "no reference is either: raise alpha."
        )
    return f"Not enough data: {rows}, {needed} are needed to rule out drift, {needed - size} more."


def _largest(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None
