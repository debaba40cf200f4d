"""What `/metrics` says, read by Prometheus's own parser, and the names by its conventions."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}
# https://prometheus.io/docs/practices/naming: base units only, and never a prefix of one.
NO_BASE_UNIT = re.compile(r"_(ms|milliseconds|us|microseconds|minutes|hours|kb|mb|kilobytes|megabytes|percent)(_|$)")


@pytest.fixture(scope="module")
def families(images, kit):
    """After some requests, good and bad."""
    images.post(INFER, content=kit.body_of(rows=3), headers=JSON)
    images.post(INFER, content=b"{", headers=JSON)
    images.get("/nope/" + "x" * 300)
    images.get("/v2/models/" + "y" * 64)
    return {family.name: family for family in text_string_to_metric_families(images.get("/metrics").text)}


def test_names_units_and_types_follow_the_conventions(families):
    assert families
    for name, family in families.items():
        assert re.fullmatch("fettle_[a-z][a-z_]*[a-z]", name)
        assert family.documentation
        assert not NO_BASE_UNIT.search(name), name
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples), name
        else:
            assert not name.endswith("_total"), name
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_rows", "_difference")), name


def test_a_histogram_is_cumulative_and_ends_with_its_count(families):
    for family in families.values():
        if family.type != "histogram":
            continue
        counts, ends = {}, {}
        for sample in family.samples:
            labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key != "le"))
            if sample.name.endswith("_bucket"):
                assert sample.value >= counts.get(labels, 0)
                counts[labels] = sample.value
                ends[labels] = sample.labels["le"]
            elif sample.name.endswith("_count"):
                assert sample.value == counts[labels]
        assert set(ends.values()) <= {"+Inf"}


def test_what_an_operator_asks_for_is_there_by_model_and_version(families):
    for name in ("fettle_queue_seconds", "fettle_inference_seconds", "fettle_batch_rows", "fettle_requests_shed"):
        samples = families[name].samples
        assert any((one.labels["model"], one.labels["version"]) == ("tiny", "1") for one in samples), name
    by_code = {one.labels["code"]: one.value for one in families["fettle_model_requests"].samples if one.value}
    assert {"200", "400"} <= set(by_code)
    assert families["fettle_requests_in_flight"].samples[0].value == 1  # the one that asks


def test_labels_are_few_whatever_paths_clients_ask_for(families):
    routes = {one.labels["route"] for one in families["fettle_requests"].samples}
    assert "unknown" in routes
    assert not any("x" * 20 in route or "y" * 20 in route for route in routes)
