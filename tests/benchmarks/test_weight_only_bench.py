"""How `weight_only.py` judges what it measured; the measuring itself takes minutes and is run by hand."""

import importlib

import numpy as np
import pytest

pytest.importorskip("openvino")


@pytest.fixture
def bench():
    return importlib.import_module("weight_only")


@pytest.fixture
def row(bench):
    def build(by, engine, precision="int8-dynamic", *, ms=1.0, size=100):
        timings = {batch: bench.Timing(ms * batch, ms * batch, ms * batch, 5, 5) for batch in bench.BATCHES}
        return bench.Row("some", engine, precision, by, size, 0.01, timings)

    return build


def test_the_fastest_peer_of_the_same_engine_and_precision_is_the_measure(bench, row):
    rows = [
        row("peer", "onnxruntime", ms=1.0),
        row("peer", "onnxruntime", ms=3.0),
        row("peer", "openvino", ms=0.1),
        row("peer", "onnxruntime", "int4-weights", ms=0.1),
        row("fettle", "onnxruntime", ms=1.04),
    ]
    claim = bench.claim_engines(rows)
    assert claim.holds
    assert claim.figures == "int8-dynamic in onnxruntime 1.04 / 1.04 × at 1.00 × the size"


@pytest.mark.parametrize("change", [{"ms": 1.06}, {"size": 102}])
def test_slower_or_larger_than_a_peer_falls_short(bench, row, change):
    assert not bench.claim_engines([row("peer", "openvino"), row("fettle", "openvino", **change)]).holds


def test_no_peer_at_all_holds_nothing(bench, row):
    claim = bench.claim_engines([row("fettle", "openvino")])
    assert not claim.holds
    assert claim.figures == "no peer was measured"
    assert bench.claim_torchao([]).figures == "torchao was not measured"
    assert not bench.claim_torchao([]).holds


def test_torchao_is_compared_with_the_fastest_engine(bench, row):
    rows = [
        row("peer", "torch inductor", ms=2.0),
        row("peer", "torch inductor", "float", ms=0.1),
        row("fettle", "openvino", ms=3.0),
        row("fettle", "onnxruntime", ms=1.0),
    ]
    claim = bench.claim_torchao(rows)
    assert claim.holds
    assert claim.figures == "int8-dynamic 0.50 / 0.50 × torchao"
    assert not bench.claim_torchao([row("peer", "torch inductor"), row("fettle", "openvino", ms=1.01)]).holds


def test_only_eight_bits_must_agree(bench):
    signals = [
        {"precision": "float", "accuracy": 0.9},
        {"precision": "int8-weights", "agreement": 0.995},
        {"precision": "int4-weights", "agreement": 0.5},
    ]
    assert bench.claim_agreement(signals).holds
    signals[1]["agreement"] = 0.98
    assert not bench.claim_agreement(signals).holds


def test_the_error_is_relative_and_over_the_rows_there_are(bench):
    reference = np.full((4, 2), 2.0)
    assert bench.error_of(reference[:3] * 1.5, reference) == pytest.approx(0.5)


def test_a_peer_that_timed_itself_is_a_row_with_its_median(bench):
    peer = bench.Apart("torchao", "int8-dynamic", {1: [3.0, 1.0, 2.0], 16: [4.0]}, np.ones((2, 3)))
    found = bench.row_of(peer, np.ones((5, 3)))
    assert (found.engine, found.by, found.error) == ("torch inductor", "peer", 0.0)
    assert found.timings[1].median_ms == 2.0


def test_the_table_shows_no_size_where_no_file_is_written(bench, row):
    table = bench.tabulate(
        [row("peer", "torch inductor", size=0), row("fettle", "openvino", size=2_000_000)], bench.QUICK
    )
    assert [cells[3] for cells in table.rows] == ["–", "2.00"]
