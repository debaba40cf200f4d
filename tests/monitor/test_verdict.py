"""The verdict: drift, no drift or not enough data, for clean and for dirty windows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fettle.core import codec
from fettle.core.errors import MonitorError, UsageError
from fettle.core.report import Report
from fettle.monitor.drift._base import Comparison
from fettle.monitor.drift.ks import KolmogorovSmirnov
from fettle.monitor.drift.psi import PopulationStability
from fettle.monitor.verdict import Judgement, judge


def draw(rng, rows: int, *, classes: int = 4, shift: float = 0.0):
    probabilities = rng.dirichlet(np.full(classes, 0.5), rows).astype(np.float32)
    return probabilities, rng.normal(shift, size=(rows, 5)).astype(np.float32)


def reference_of(rng, rows: int, **options):
    probabilities, statistics = draw(rng, rows, **options)
    return {"probabilities": probabilities, "statistics": statistics}


def test_no_drift_in_plenty_of_rows(rng, make_window):
    judgement = judge(reference_of(rng, 1000), make_window(*draw(rng, 1000)))
    assert judgement.verdict == "no drift"
    assert judgement.missing == 0
    assert judgement.drifted == ()
    assert "0.8 or more" in judgement.sentence


def test_drift_names_the_feature(rng, make_window):
    probabilities, statistics = draw(rng, 500)
    statistics[:, 4] += 1.0
    judgement = judge(reference_of(rng, 1000), make_window(probabilities, statistics))
    assert judgement.verdict == "drift"
    assert judgement.drifted == ("roughness",)
    assert judgement.findings[0].drifted
    assert "roughness" in judgement.sentence
    assert "1 of 9 features" in judgement.sentence


def test_drift_of_a_softmax_output_is_seen(rng, make_window):
    probabilities, statistics = draw(rng, 500)
    probabilities = probabilities * np.array([1, 1, 1, 4], np.float32)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    judgement = judge(reference_of(rng, 1000), make_window(probabilities, statistics))
    assert judgement.verdict == "drift"
    assert "p3" in judgement.drifted


@pytest.mark.parametrize("rows", [0, 1, 2, 10, 50, 100])
def test_small_windows_say_how_many_rows_are_missing(rng, make_window, rows):
    judgement = judge(reference_of(rng, 1000), make_window(*draw(rng, rows)))
    assert judgement.verdict == "not enough data"
    assert judgement.needed is not None
    assert judgement.missing == judgement.needed - rows > 0
    assert f"{judgement.missing} more" in judgement.sentence


def test_as_many_rows_as_needed_are_enough(rng, make_window):
    reference = reference_of(rng, 1000)
    needed = judge(reference, make_window(*draw(rng, 10))).needed
    assert judge(reference, make_window(*draw(rng, needed))).verdict == "no drift"
    assert judge(reference, make_window(*draw(rng, needed - 1))).verdict == "not enough data"


def test_the_rows_needed_are_those_of_the_hardest_test_at_the_corrected_level(rng, make_window):
    """Nine features under two tests: Holm's first step is at alpha / 18."""
    judgement = judge(reference_of(rng, 800), make_window(*draw(rng, 10)), alpha=0.01, power=0.9)
    tests = (KolmogorovSmirnov(), PopulationStability())
    needs = [test.needed(800, alpha=0.01 / 18, power=0.9) for test in tests]
    assert [each.needed for each in judgement.sensitivities] == needs
    assert judgement.needed == max(needs)


def test_ten_rows_of_blatant_drift_are_drift(rng, make_window):
    assert judge(reference_of(rng, 1000), make_window(*draw(rng, 10, shift=8.0))).verdict == "drift"


def test_a_reference_too_small_says_how_large_it_must_be(rng, make_window):
    judgement = judge(reference_of(rng, 40), make_window(*draw(rng, 5000)))
    assert judgement.verdict == "not enough data"
    assert (judgement.needed, judgement.missing) == (None, None)
    least = max(each.needed_reference for each in judgement.sensitivities)
    assert f"at least {least}" in judgement.sentence
    assert judge(reference_of(rng, least), make_window(*draw(rng, 5))).needed is not None


def test_a_certain_but_small_difference_is_no_drift(rng, make_window):
    judgement = judge(reference_of(rng, 20_000), make_window(*draw(rng, 20_000, shift=0.1)))
    assert judgement.verdict == "no drift"
    assert judgement.findings[0].corrected_p < 0.001
    assert "differs, by less than counts" in judgement.sentence


def test_something_rejected_is_never_not_enough_data(rng, make_window):
    """KS rejects, by an effect too small to count, and PSI is far from the rows it needs."""
    tests = (KolmogorovSmirnov(minimum=0.9), PopulationStability(minimum=5.0, bins=300))
    judgement = judge(reference_of(rng, 1000), make_window(*draw(rng, 100, shift=0.7)), tests=tests)
    assert judgement.needed is None
    assert any(each.corrected_p <= 0.001 for each in judgement.findings)
    assert judgement.verdict == "no drift"
    assert "PSI" not in judgement.sentence  # it can promise nothing


def test_holm_by_hand_over_features_and_tests(rng, make_window):
    """Recompute every finding alone and correct them by the book."""
    reference, (probabilities, statistics) = reference_of(rng, 300), draw(rng, 150, shift=0.3)
    judgement = judge(reference, make_window(probabilities, statistics))
    raw = {}
    for test in (KolmogorovSmirnov(), PopulationStability()):
        for i in range(4):
            raw[f"p{i}", test.name] = test.compare(reference["probabilities"][:, i], probabilities[:, i]).p_value
        for i, name in enumerate(("mean", "std", "min", "max", "roughness")):
            raw[name, test.name] = test.compare(reference["statistics"][:, i], statistics[:, i]).p_value
    corrected, floor = {}, 0.0
    for step, (pair, p) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, p * (len(raw) - step)))
        corrected[pair] = floor
    assert len(judgement.findings) == 18
    for finding in judgement.findings:
        assert finding.p_value == raw[finding.feature, finding.test]
        assert finding.corrected_p == pytest.approx(corrected[finding.feature, finding.test])
        assert finding.drifted == (finding.corrected_p <= 0.001 and finding.effect >= finding.minimum)


def test_false_alarms_stay_below_the_level(make_window):
    """150 looks without drift: one false alarm at alpha 0.001 has a chance of 14 %, three of 0.05 %."""
    rng = np.random.default_rng(11)
    alarms = 0
    for rows in (20, 50, 100, 300, 1000):
        for _ in range(30):
            alarms += judge(reference_of(rng, 500), make_window(*draw(rng, rows))).verdict == "drift"
    assert alarms <= 2


def test_a_higher_alpha_keeps_its_level_too(make_window):
    rng = np.random.default_rng(12)
    alarms = sum(
        judge(reference_of(rng, 400), make_window(*draw(rng, 60)), alpha=0.1).verdict == "drift" for _ in range(100)
    )
    assert alarms <= 22  # 10 expected at most, 4 standard deviations


DIRTY = {
    "all probabilities NaN": (lambda p, s: (np.full_like(p, np.nan), s), "drift"),
    "all statistics NaN": (lambda p, s: (p, np.full_like(s, np.nan)), "drift"),
    "infinite statistics": (lambda p, s: (p, np.full_like(s, np.inf)), "drift"),
    "one NaN": (lambda p, s: (p, np.where(np.arange(s.size).reshape(s.shape) == 7, np.nan, s)), "no drift"),
    "a few out of range": (lambda p, s: (p, np.where(np.arange(len(s))[:, None] < 3, 1e9, s)), "no drift"),
    "half out of range": (lambda p, s: (p, np.where(np.arange(len(s))[:, None] % 2 == 0, 1e9, s)), "drift"),
    "one value only": (lambda p, s: (p, np.zeros_like(s)), "drift"),
    "rounded": (lambda p, s: (p, np.round(s, 1)), "no drift"),
    "outputs saturated": (lambda p, s: ((p == p.max(axis=1, keepdims=True)).astype(p.dtype), s), "drift"),
}


@pytest.mark.parametrize("kind", sorted(DIRTY))
def test_dirty_windows_have_a_defined_verdict(rng, make_window, kind):
    spoil, expected = DIRTY[kind]
    judgement = judge(reference_of(rng, 1000), make_window(*spoil(*draw(rng, 600))))
    assert judgement.verdict == expected
    json.loads(codec.canonical(judgement))


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_a_constant_column_on_both_sides_is_no_drift(rng, make_window, value):
    reference, (probabilities, statistics) = reference_of(rng, 1000), draw(rng, 600)
    reference["statistics"][:, 2] = value
    statistics[:, 2] = value
    assert judge(reference, make_window(probabilities, statistics)).verdict == "no drift"
    statistics[::4, 2] = 7.0
    judgement = judge(reference, make_window(probabilities, statistics))
    assert judgement.drifted == ("min",)


@pytest.mark.parametrize(("classes", "features"), [(1, 6), (2, 7), (100, 105)])
def test_any_number_of_classes(rng, make_window, classes, features):
    judgement = judge(reference_of(rng, 1500, classes=classes), make_window(*draw(rng, 1500, classes=classes)))
    assert judgement.verdict == "no drift"
    assert len({finding.feature for finding in judgement.findings}) == features


def test_another_number_of_classes_is_an_error(rng, make_window):
    with pytest.raises(MonitorError, match="got 3 in the log and 4 in the artifact"):
        judge(reference_of(rng, 100), make_window(*draw(rng, 10, classes=3)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.pop("probabilities"), "'probabilities'.*got none"),
        (lambda r: r.pop("statistics"), "'statistics'.*got none"),
        (lambda r: r.update(probabilities=np.zeros((0, 4))), "at least one row"),
        (lambda r: r.update(probabilities=np.zeros(4)), "shape"),
        (lambda r: r.update(statistics=np.zeros((100, 4))), r"got \[100, 4\]"),
        (lambda r: r.update(statistics=np.zeros((99, 5))), r"got \[99, 5\]"),
    ],
)
def test_an_unusable_reference_is_an_error(rng, make_window, spoil, message):
    reference = reference_of(rng, 100)
    spoil(reference)
    with pytest.raises(MonitorError, match=message):
        judge(reference, make_window(*draw(rng, 10)))


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": 1}, {"alpha": -1}, {"power": 1.0}, {"tests": ()}], ids=str)
def test_settings_that_mean_nothing_are_refused(rng, make_window, options):
    with pytest.raises(UsageError):
        judge(reference_of(rng, 100), make_window(*draw(rng, 10)), **options)


@pytest.mark.parametrize("p_value", [math.nan, -0.1, 1.1])
def test_a_defective_test_is_named(p_value):
    with pytest.raises(MonitorError, match="defective"):
        Comparison(p_value=p_value, effect=0.0, statistic=0.0, null_mean=0.0)


def test_the_same_window_gives_the_same_judgement_bit_by_bit(rng, make_window):
    reference, window = reference_of(rng, 300), make_window(*draw(rng, 200, shift=0.5))
    assert codec.canonical(judge(reference, window)) == codec.canonical(judge(reference, window))


def test_a_judgement_survives_json(rng, make_window):
    judgement = judge(reference_of(rng, 300), make_window(*draw(rng, 200, shift=0.5)))
    assert codec.from_json(Judgement, json.loads(codec.canonical(judgement)), where="test") == judgement


def test_as_a_report(rng, make_window):
    judgement = judge(reference_of(rng, 300), make_window(*draw(rng, 200, shift=2.0)))
    report = judgement.report()
    assert isinstance(report, Report)
    assert (report.kind, report.subject) == ("drift", judgement.digest)
    assert len(report.measurements) == len(judgement.findings)
    measured = report["drift.ks.mean"]
    assert measured.value > 0.5
    assert measured.unit == "D"
    assert measured.n == 200
    assert measured.note.endswith("drifted")
    assert report.notes == (judgement.sentence,)


def test_the_global_random_state_is_left_alone(rng, make_window):
    before = np.random.get_state()[1].copy()
    judge(reference_of(rng, 300), make_window(*draw(rng, 200)))
    assert (np.random.get_state()[1] == before).all()


def test_one_test_alone(rng, make_window):
    judgement = judge(reference_of(rng, 300), make_window(*draw(rng, 300)), tests=(KolmogorovSmirnov(minimum=0.3),))
    assert {finding.test for finding in judgement.findings} == {"ks"}
