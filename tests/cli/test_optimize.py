"""`fettle optimize`: what it prints, what it registers, and its exit codes."""

import re
from pathlib import Path

import pytest

TOP = {"name", "met_floor", "best", "baseline", "candidates", "front", "decisions", "layers", "report"}
CANDIDATE = {"version", "digest", "runtime", "precision", "steps", "metric", "latency_ms", "size_bytes"}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def candidates(outcome):
    return [outcome["best"], outcome["baseline"], *outcome["candidates"], *outcome["front"]]


def test_json_has_exactly_these_keys(tiny):
    outcome = tiny.ran.json
    assert set(outcome) == TOP
    assert outcome["name"] == "tiny"
    assert outcome["met_floor"] is True
    for candidate in candidates(outcome):
        assert set(candidate) == CANDIDATE
        assert set(candidate["metric"]) == {"name", "value", "low", "high", "n"}
        assert set(candidate["latency_ms"]) == {"p50", "p95", "p99", "batch", "threads"}


def test_json_values_have_their_types(tiny):
    for candidate in candidates(tiny.ran.json):
        assert re.fullmatch("[0-9a-f]{64}", candidate["digest"])
        assert candidate["precision"] in ("float", "int8", "bf16", "fp16")
        assert ("quantize.post_training" in candidate["steps"]) == (candidate["precision"] == "int8")
        assert candidate["metric"]["name"] == "accuracy"
        assert candidate["metric"]["n"] == 60
        assert candidate["metric"]["low"] <= candidate["metric"]["value"] <= candidate["metric"]["high"]
        latency = candidate["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert (latency["batch"], latency["threads"]) == (1, 1)
        assert isinstance(candidate["size_bytes"], int)
        assert candidate["size_bytes"] > 0


def test_every_runtime_and_precision_was_tried(tiny):
    tried = {(each["precision"], each["runtime"]) for each in tiny.ran.json["candidates"]}
    floats = {("float", runtime) for runtime in ("eager", "onnxruntime", "openvino")}
    # Sixteen bits are tried where the processor has them.
    assert tried - {("bf16", "eager"), ("bf16", "openvino")} == floats | {("int8", "onnxruntime"), ("int8", "openvino")}


def test_only_what_is_registered_has_a_version(tiny):
    outcome = tiny.ran.json
    best = outcome["best"]
    assert best["version"] == 1
    for each in candidates(outcome):
        assert each["version"] == (1 if each["digest"] == best["digest"] else None)


def test_the_baseline_is_the_untouched_model(tiny):
    baseline = tiny.ran.json["baseline"]
    assert (baseline["runtime"], baseline["precision"], baseline["steps"]) == ("eager", "float", [])


def test_the_front_holds_candidates_that_none_beats_in_all(tiny):
    def figures(candidate):
        return candidate["metric"]["value"], -candidate["latency_ms"]["p50"], -candidate["size_bytes"]

    outcome = tiny.ran.json
    front = {each["digest"] for each in outcome["front"]}
    assert front
    for one in outcome["candidates"]:
        beaten = any(
            figures(other) != figures(one) and all(a >= b for a, b in zip(figures(other), figures(one), strict=True))
            for other in outcome["candidates"]
        )
        assert (one["digest"] in front) is not beaten


def test_the_report_is_a_page(tiny):
    page = Path(tiny.ran.json["report"])
    assert page.is_absolute()
    assert page.is_relative_to(tiny.home)
    assert "<html" in page.read_text()


def test_progress_goes_to_stderr(tiny):
    assert "done" in tiny.ran.err


@pytest.mark.usefixtures("eager_only")
def test_table_and_registered_version_for_people(run, write_project, tmp_path, home):
    ran = run("optimize", write_project(tmp_path / "p"), home=home)
    assert ran.code == 0
    for text in ("float in eager", "accuracy", "registered as tiny:1", "report: "):
        assert text in ran.out


@pytest.mark.usefixtures("eager_only")
def test_the_file_itself_may_be_named(run, write_project, tmp_path, home):
    ran = run("optimize", write_project(tmp_path / "p") / "fettle.toml", "--json", home=home)
    assert ran.code == 0
    assert ran.json["best"]["digest"] == ran.json["baseline"]["digest"]
    assert ran.json["baseline"]["version"] == 1


@pytest.mark.usefixtures("eager_only")
@pytest.mark.parametrize(
    ("budget", "words"),
    [("max_drop = -0.5", "floor of"), ("min_metric = 0.99", "at least 0.9900"), ("max_drop = -0.001", "floor of")],
)
def test_missed_floor_is_told_and_the_best_registered_all_the_same(run, write_project, tmp_path, home, budget, words):

    ran = run("optimize", write_project(tmp_path / "p", toml={"max_drop = 0.05": budget}), "--json", home=home)
    line = ran.refused(1)
    assert "The floor is missed" in line
    assert words in line
    assert ran.json["met_floor"] is False
    assert ran.json["best"]["version"] == 1
    shown = run("registry", "show", "tiny", "--json", home=home)
    assert shown.json["digest"] == ran.json["best"]["digest"]


@pytest.mark.usefixtures("eager_only")
def test_a_project_that_prints_does_not_break_the_json(run, write_project, tmp_path, home):
    folder = write_project(tmp_path / "p", model={"import torch\n": 'import torch\nprint("loading")\n'})
    ran = run("optimize", folder, "--json", home=home)
    assert set(ran.json) == TOP
    assert "loading" in ran.err


@pytest.mark.usefixtures("eager_only")
def test_without_test_split_and_without_train(run, write_project, tmp_path, home):

    folder = write_project(tmp_path / "p", toml={'train = "data:train"\n': "", 'test = "data:test"\n': ""})
    ran = run("optimize", folder, "--json", home=home)
    assert ran.code == 0
    assert ran.json["best"]["metric"] == ran.json["candidates"][0]["metric"]


@pytest.mark.usefixtures("eager_only")
def test_two_projects_with_modules_of_the_same_name_do_not_mix(run, write_project, tmp_path, home):

    first = write_project(tmp_path / "first")
    second = write_project(
        tmp_path / "second", toml={'"tiny"': '"second"'}, model={"Linear(6, 16)": "Linear(6, 16, bias=False)"}
    )
    digests = [run("optimize", folder, "--json", home=home).json["best"]["digest"] for folder in (first, second, first)]
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]
