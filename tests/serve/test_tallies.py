"""Tallies beside prometheus_client's own classes: the same text from the same events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from fettle.serve.tallies import Counts, Spreads

BUCKETS = (0.001, 0.5, 1, 16)


def text_of(registry):
    """Without the times of creation, which prometheus_client adds and we do not."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100) | st.sampled_from(BUCKETS)), max_size=30))
def test_a_spread_renders_as_a_histogram_of_prometheus_client(events):
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("seconds", "Of things.", ("kind",), buckets=BUCKETS, registry=theirs)
    spreads = Spreads("seconds", "Of things.", ("kind",), buckets=BUCKETS, registry=ours)
    for kind, value in events:
        histogram.labels(kind).observe(value)
        spreads.labels(kind).observe(value)
    assert text_of(ours) == text_of(theirs)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), max_size=30))
def test_a_count_renders_as_a_counter_of_prometheus_client(events):
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    counter = Counter("things", "Of things.", ("kind", "code"), registry=theirs)
    counts = Counts("things", "Of things.", ("kind", "code"), registry=ours)
    for kind, by in events:
        counter.labels(kind, "200").inc(by)
        counts.labels(kind, "200").inc(by)
    assert text_of(ours) == text_of(theirs)


def test_values_that_need_quoting_are_quoted():
    registry = CollectorRegistry()
    Counts("things", "Of things.", ("kind",), registry=registry).labels('a"\n').inc()
    assert 'things_total{kind="a\\"\\n"} 1.0' in text_of(registry)


def test_the_wrong_number_of_labels_is_a_fault_of_ours():
    counts = Counts("things", "Of things.", ("kind", "code"), registry=CollectorRegistry())
    with pytest.raises(AssertionError, match=r"things has the labels .*got \('a',\)"):
        counts.labels("a")
