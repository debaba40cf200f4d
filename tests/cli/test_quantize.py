"""`fettle quantize`: the recipe that was asked for is what is built, and what cannot be meant is refused early."""

from pathlib import Path

import pytest

import fettle.demo.digits
from fettle.cli.quantize import Method, Request
from fettle.core.errors import UsageError

DIGITS = Path(fettle.demo.digits.__file__).parent
# Wide enough for the methods that leave small layers alone.
WIDE = {"nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)": "nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 64)"}
WIDE_CLASSES = {'["a", "b", "c"]': "[]"}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def quantize(run, write_project, tmp_path, home):
    """The command on the tiny project, whose files may be written differently."""

    def call(*arguments, **files):
        return run("quantize", write_project(tmp_path / "p", **files), *arguments, home=home)

    return call


def names(request):
    return [spec.name.removeprefix("quantize.") for spec in request.steps()]


@pytest.mark.slow
def test_static_on_the_embedded_digits(run, home):
    ran = run("quantize", DIGITS, "--runtime", "onnxruntime", "--correct", "bias-correction", "--json", home=home)
    assert ran.code == 0, ran.err[-2000:]
    tried = {(each["precision"], each["runtime"]): each for each in ran.json["candidates"]}
    assert set(tried) == {("float", "eager"), ("float", "onnxruntime"), ("int8", "onnxruntime")}
    asked = tried["int8", "onnxruntime"]
    assert asked["steps"] == ["quantize.post_training", "quantize.bias_correction"]
    assert asked["metric"]["value"] >= ran.json["baseline"]["metric"]["value"] - 0.01
    assert asked["size_bytes"] < 0.5 * ran.json["baseline"]["size_bytes"]
    assert Path(ran.json["report"]).is_relative_to(home)
    assert run("registry", "show", "digits", "--json", home=home).json["digest"] == ran.json["best"]["digest"]


@pytest.mark.parametrize(
    ("method", "precision", "step"),
    [(["dynamic"], "int8-dynamic", "dynamic"), (["weight-only", "--bits", "4"], "int4-weights", "weight_only")],
)
def test_methods_without_calibration(quantize, method, precision, step):
    arguments = ("--runtime", "onnxruntime", "--json")
    ran = quantize("--method", *method, *arguments, model=WIDE, toml=WIDE_CLASSES)
    assert ran.code == 0, ran.err[-2000:]
    asked = [each for each in ran.json["candidates"] if each["steps"]]
    assert [(each["precision"], each["runtime"]) for each in asked] == [(precision, "onnxruntime")]
    assert asked[0]["steps"] == [f"quantize.{step}"]
    assert ran.json["best"]["version"] == 1


def test_static_is_what_is_done_when_nothing_is_said_and_people_get_a_table(quantize):
    ran = quantize("--runtime", "onnxruntime", "--keep-float", "0")
    assert ran.code == 0, ran.err[-2000:]
    for text in ("int8 in onnxruntime", "float in eager", "registered as tiny:1", "report: ", "note: "):
        assert text in ran.out


def test_a_missed_floor_is_told_by_name_and_the_best_registered_all_the_same(quantize, run, home):
    ran = quantize("--runtime", "null", "--json", toml={"max_drop = 0.05": "max_drop = -0.5"})
    line = ran.refused(1)
    for words in ("int8 cannot be used under this budget", "int8 in null: accuracy", "below the floor"):
        assert words in line
    assert ran.json["met_floor"] is False
    assert run("registry", "show", "tiny", "--json", home=home).json["digest"] == ran.json["best"]["digest"]


def test_a_layer_that_does_not_exist_is_told_with_those_that_do(quantize):
    line = quantize("--runtime", "null", "--keep-float", "frist", "--json").refused(2)
    assert "names nothing that would be quantized: 'frist'" in line
    assert "Layers: 0, 2" in line


def test_when_another_is_better_it_says_so(quantize, monkeypatch):
    monkeypatch.setattr("fettle.pipeline.choose", lambda candidates, budget, baseline: baseline)
    ran = quantize("--runtime", "onnxruntime", "--json")
    assert ran.code == 0, ran.err[-2000:]
    assert ran.json["best"]["steps"] == []
    assert "int8 was built, and float in eager is better and registered" in ran.err


WRONG = {
    "--method dynamic --observer min_max": "--observer belongs to --method static or qat, got --method dynamic",
    "--method weight-only --weight-bits 4": "--weight-bits belongs to --method static or qat, got --method weight-only",
    "--method dynamic --bits 8": "--bits belongs to --method weight-only, got --method dynamic",
    "--bits 4": "--bits belongs to --method weight-only, got --method static",
    "--bits 0": "--bits belongs to --method weight-only",
    "--group 64": "--group belongs to --method weight-only, got --method static",
    "--epochs 3": "--epochs belongs to --method qat, got --method static",
    "--epochs 0": "--epochs belongs to --method qat, got --method static",
    "--learn-scales": "--learn-scales belongs to --method qat, got --method static",
    "--method qat --correct adaround": "--correct belongs to --method static, got --method qat",
    "--correct adaruond": "--correct 'adaruond' is unknown; did you mean 'adaround'?",
    "--observer minmax": "--observer 'minmax' is unknown; did you mean 'min_max'?",
    "--observer _base": "--observer '_base' is unknown",
    "--weight-bits 1": "weight_bits must be 2 to 8, got 1",
    "--method qat --weight-bits 9": "weight_bits must be 2 to 8, got 9",
    "--method qat --epochs 0": "epochs must be at least 1, got 0",
    "--method weight-only --bits 5": "bits must be 4 or 8, got 5",
    "--method weight-only --group 0": "group must be 32, 64, 128, 256 or None, got 0",
    "--method weight-only --group 48": "group must be 32, 64, 128, 256 or None, got 48",
    "--runtime onnxrt": "unknown runtime 'onnxrt'; did you mean 'onnxruntime'?",
    "--runtime eager": "--runtime must name one that executes int8, got 'eager': of those installed, ",
    "--method dynamic --runtime null": "--runtime must name one that executes int8-dynamic, got 'null'",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_refused_before_any_work(quantize, home, arguments):
    ran = quantize(*arguments.split(), "--json", model="raise RuntimeError('imported')")
    assert WRONG[arguments] in ran.refused(2)
    assert ran.out == ""
    assert not home.exists()


@pytest.mark.parametrize("arguments", [["--method", "statik"], ["--method"], ["--weight-bits", "four"], ["a", "b"]])
def test_what_cannot_be_parsed_is_exit_code_2(quantize, arguments):
    ran = quantize(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_training_needs_data_to_train_on(quantize, home):
    line = quantize("--method", "qat", toml={'train = "data:train"\n': ""}).refused(2)
    assert "fettle.toml: data.train must be named" in line
    assert not home.exists()


@pytest.mark.usefixtures("eager_only")
def test_where_no_runtime_can_it_says_so(quantize):
    assert "no installed runtime executes int8" in quantize().refused(2)


def test_no_project(run, tmp_path, home):
    assert "does not exist" in run("quantize", tmp_path, home=home).refused(2)


def test_without_torch_it_names_the_extra(process, write_project, tmp_path, home):
    before = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
    line = process("quantize", write_project(tmp_path / "p"), home=home, before=before).refused(1)
    assert line == "fettle: fettle quantize needs torch: pip install 'fettle-ml[optimize]'"


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        ((), ["post_training"]),
        (("adaround",), ["post_training", "adaround"]),
        (("smooth_quant",), ["smooth_quant", "post_training"]),
        (("bias_correction", "adaround", "adaround"), ["post_training", "adaround", "bias_correction"]),
        (
            ("adaround", "smooth_quant", "bias_correction", "cross_layer_equalization"),
            ["cross_layer_equalization", "smooth_quant", "post_training", "adaround", "bias_correction"],
        ),
    ],
)
def test_corrections_stand_where_they_work_in_whatever_order_they_are_named(said, steps):
    assert names(Request(correct=said)) == steps


@pytest.mark.parametrize(
    ("fields", "name", "step", "parameters"),
    [
        ({}, "int8", "post_training", {"observer": "histogram_mse", "weight_bits": 8, "keep_float": ()}),
        (
            {"observer": "min_max", "weight_bits": 4, "keep_float": ("a", "b")},
            "int8 with 4-bit weights",
            "post_training",
            {"observer": "min_max", "weight_bits": 4, "keep_float": ("a", "b")},
        ),
        ({"method": Method.DYNAMIC, "keep_float": ("a",)}, "int8 dynamic", "dynamic", {"keep_float": ("a",)}),
        ({"method": Method.WEIGHT_ONLY}, "int8 weights", "weight_only", {"bits": 8, "group": None}),
        (
            {"method": Method.WEIGHT_ONLY, "bits": 4, "group": 32},
            "int4 weights",
            "weight_only",
            {"bits": 4, "group": 32},
        ),
        ({"method": Method.QAT}, "int8 trained", "qat", {"learn_scales": False}),
        (
            {"method": Method.QAT, "epochs": 7, "learn_scales": True, "weight_bits": 4, "observer": "entropy"},
            "int8 trained with 4-bit weights",
            "qat",
            {"epochs": 7, "learn_scales": True, "weight_bits": 4, "observer": "entropy"},
        ),
    ],
)
def test_what_is_said_becomes_the_fields_of_the_step(fields, name, step, parameters):
    request = Request(**fields)
    (spec,) = request.steps()
    assert (request.name, spec.name) == (name, f"quantize.{step}")
    assert parameters.items() <= spec.parameters.items()


OPTIONS = {
    "observer": ("min_max", {"static", "qat"}),
    "weight_bits": (4, {"static", "qat"}),
    "correct": (("adaround",), {"static"}),
    "bits": (8, {"weight-only"}),
    "group": (64, {"weight-only"}),
    "epochs": (2, {"qat"}),
    "learn_scales": (True, {"qat"}),
    "keep_float": (("a",), {"static", "qat", "dynamic", "weight-only", "half"}),
    "dtype": ("float16", {"half"}),
}


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_taken_by_its_methods_and_refused_by_the_others(method, option):
    value, methods = OPTIONS[option]
    if method not in methods:
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} belongs to .*, got --method {method}"):
            Request(method=method, **{option: value})
        return
    steps = Request(method=method, **{option: value}).steps()
    assert option == "correct" or steps[0].parameters[option] == value
