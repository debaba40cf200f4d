"""The joined path through the Python API, in as few runtimes as each test needs."""

import numpy as np
import pytest
import torch
from torch import nn

import fettle
from fettle.compress.quantize.post_training import PostTraining
from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, DataError, ExportError, MissingExtra, RegistryError, UsageError
from fettle.pipeline import optimize
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.stages.trials import BASELINE
from fettle.testing.models import CASES

EAGER = ("eager",)
ORT = ("onnxruntime",)
# What slack buys depends on measured times, and so on what else the machine does.
NO_SLACK = fettle.Budget(max_drop=0.1, slack=0.0)
NULL = ("null",)  # quantizes as every other, and exports nothing: for tests that do not look at answers


def mlp():
    return CASES["mlp"].build()


def rows(model, count=60, *, case="mlp", seed=1):
    """Inputs of the case; labels are what the model itself says, for nine of ten rows."""
    inputs = CASES[case].data(rows=count, seed=seed)
    with torch.no_grad():
        outputs = model(*inputs)
    scores = outputs[0] if isinstance(outputs, tuple) else outputs
    labels = scores.argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % scores.shape[1]
    parts = list(range(0, count, 20))
    return [
        (
            tuple(x[i : i + 20] for x in inputs) if len(inputs) > 1 else inputs[0][i : i + 20],
            labels[i : i + 20],
        )
        for i in parts
    ]


@pytest.fixture
def go(tmp_path, float_in_eager):
    """`optimize` of a small model, in eager alone and without the registry where nothing else is asked for."""

    def run(model=None, *, case="mlp", **changes):
        model = model or CASES[case].build()
        keywords = {
            "validation": rows(CASES[case].build(), case=case),
            "runtimes": EAGER,
            "home": tmp_path / "home",
            "register": False,
            "budget": fettle.Budget(slack=0.0),
        }
        return optimize(model, CASES[case].data(rows=1), **{**keywords, **changes})

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run in ONNX Runtime with all three splits; each counts how often it was passed over."""
    passes = {"validation": 0, "train": 0, "test": 0}

    def loader(name, seed):
        def read():
            passes[name] += 1
            return rows(mlp(), seed=seed)

        return read

    home = tmp_path_factory.mktemp("whole") / "home"
    said = []
    outcome = optimize(
        mlp(),
        CASES["mlp"].data(rows=1),
        validation=loader("validation", 1),
        train=loader("train", 2),
        test=loader("test", 3),
        budget=NO_SLACK,
        classes=("a", "b", "c", "d"),
        name="mlp",
        runtimes=ORT,
        home=home,
        progress=lambda what, share: said.append((what, share)),
    )
    return outcome, passes, home, said


def test_the_outcome_holds_all_candidates(whole):
    outcome = whole[0]
    assert [trial.candidate.label for trial in outcome.candidates] == [
        BASELINE,
        "int8 in onnxruntime",
        "float in onnxruntime",
    ]
    assert outcome.met_floor
    assert outcome.baseline.candidate.label == BASELINE
    assert {trial.artifact.digest for trial in outcome.front} <= {t.artifact.digest for t in outcome.candidates}
    assert outcome.report.is_file()


def test_the_test_split_is_read_by_the_best_and_the_original_only(whole):
    outcome, passes, _, _ = whole
    assert passes["test"] == 2
    assert outcome.best.report.metric.data == "test"
    assert outcome.baseline.report.metric.data == "test"
    assert {trial.report.metric.data for trial in outcome.candidates} == {"validation"}


def test_the_paired_difference_is_that_of_the_rows(whole):
    outcome = whole[0]
    split = rows(mlp(), seed=3)
    best, original = outcome.best.load(), outcome.baseline.load()
    right = [
        np.concatenate([runner(x.numpy()).argmax(axis=1) == y.numpy() for x, y in split]) for runner in (best, original)
    ]
    assert outcome.best.report.metric.value == pytest.approx(right[0].mean())
    assert outcome.best.report["paired.difference"].value == pytest.approx(right[0].mean() - right[1].mean())


def test_training_data_only_calibrates(whole):
    outcome, passes, _, _ = whole
    assert passes["train"] > 2  # to check and hash, then once for each quantizer and correction that is tried
    splits = {split.name: split.purpose for split in outcome.comparison.splits}
    assert list(splits) == ["validation", "train", "test"]
    int8 = outcome.candidates[1].artifact.manifest.provenance
    assert int8["data.calibration"] != int8["data.validation"]


def test_each_candidate_answers_its_golden_inputs_when_it_is_loaded(whole):
    for trial in whole[0].candidates:
        golden = trial.artifact.golden()
        runner = trial.load()
        inputs = {key.removeprefix("input:"): value for key, value in golden.items() if key.startswith("input:")}
        for name, answer in runner.run(inputs).items():
            difference = np.abs(answer - golden[f"output:{name}"]).max()
            assert difference <= trial.artifact.manifest.tolerance


def test_lineage_leads_to_the_original(whole):
    outcome = whole[0]
    first, *others = outcome.candidates
    assert "parent" not in first.artifact.manifest.provenance
    assert {trial.artifact.manifest.provenance["parent"] for trial in others} == {first.artifact.digest}


def test_the_registered_version_is_the_best(whole):
    outcome, _, home, _ = whole
    version = fettle.Registry(fettle.Home(home)).get("mlp")
    assert version.digest == outcome.best.artifact.digest
    assert (version.version, version.aliases) == (1, ("champion",))
    x = rows(mlp())[0][0].numpy()
    np.testing.assert_array_equal(fettle.load("mlp", home=fettle.Home(home))(x), outcome.best.load()(x))


def test_progress_only_grows_and_names_what_is_done(whole):
    said = whole[3]
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] < 1
    assert {BASELINE, "int8 in onnxruntime", "float in onnxruntime", "final figures"} <= {what for what, _ in said}


def test_the_same_work_gives_the_same_digests(whole, tmp_path):
    outcome = whole[0]
    again = optimize(
        mlp(),
        CASES["mlp"].data(rows=1),
        validation=rows(mlp(), seed=1),
        train=rows(mlp(), seed=2),
        budget=NO_SLACK,
        classes=("a", "b", "c", "d"),
        name="other-name",
        runtimes=ORT,
        home=tmp_path / "elsewhere",
        register=False,
    )
    assert [t.artifact.digest for t in again.candidates] == [t.artifact.digest for t in outcome.candidates]


def test_a_failed_export_is_named_and_does_not_stop_the_run(go, monkeypatch):
    def broken(self, program, directory, signature):
        raise ExportError("the engine has no such operation")

    monkeypatch.setattr(OnnxRuntime, "export", broken)
    outcome = go(runtimes=ORT)
    assert outcome.best.candidate.label == BASELINE
    failed = {each.label: each.failure for each in outcome.comparison.failed}
    assert set(failed) == {"int8 in onnxruntime", "float in onnxruntime"}
    assert all("the engine has no such operation" in reason for reason in failed.values())
    assert "the engine has no such operation" in outcome.report.read_text()
    assert len(outcome.to_json()["candidates"]) == 1


def test_a_failed_step_is_named_and_float_goes_on(go, monkeypatch):
    def broken(self, model, context):
        raise ValueError("no scale\nand more")

    monkeypatch.setattr(PostTraining, "apply", broken)
    outcome = go(runtimes=ORT)
    assert {each.label: each.failure for each in outcome.comparison.failed} == {
        "int8 in onnxruntime": "ValueError: no scale"
    }
    assert [t.candidate.label for t in outcome.candidates] == [BASELINE, "float in onnxruntime"]


def test_a_candidate_that_fails_while_it_is_timed_is_named(go, monkeypatch):
    load = OnnxRuntime.load

    def fragile(self, artifact, *, threads):
        runner = load(self, artifact, threads=threads)
        run, single = runner.run, []

        def run_once(inputs):
            if len(next(iter(inputs.values()))) == 1:
                single.append(1)
                raise RuntimeError("out of memory")
            return run(inputs)

        runner.run = run_once
        return runner

    monkeypatch.setattr(OnnxRuntime, "load", fragile)
    outcome = go(runtimes=ORT)
    assert [t.candidate.label for t in outcome.candidates] == [BASELINE]
    assert {each.failure for each in outcome.comparison.failed} == {"RuntimeError: out of memory"}


def test_after_the_time_limit_the_rest_is_named_as_not_tried(go, monkeypatch):
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr("fettle.stages.trials.time.monotonic", lambda: next(ticks))
    outcome = go(runtimes=ORT, budget=fettle.Budget(time_limit="1s"))
    assert outcome.best.candidate.label == BASELINE
    assert [each.label for each in outcome.comparison.failed] == ["int8 in onnxruntime", "float in onnxruntime"]
    assert all("not tried: the time limit of 1s" in each.failure for each in outcome.comparison.failed)


def test_one_shot_iterators_will_do(go):
    outcome = go(validation=iter(rows(mlp())), test=(batch for batch in rows(mlp(), seed=4)), runtimes=NULL)
    assert [each.failure for each in outcome.comparison.failed] == []
    assert outcome.best.report.metric.data == "test"


@pytest.mark.parametrize("same", [True, False])
def test_one_iterator_for_validation_and_training(go, same):
    source = iter(rows(mlp()))
    outcome = go(validation=source, train=source if same else None, runtimes=NULL)
    assert not outcome.comparison.failed
    assert [split.name for split in outcome.comparison.splits] == ["validation"]


@pytest.mark.parametrize("view", [lambda x: x[:, ::-1], lambda x: np.asfortranarray(x)])
def test_mirrored_and_read_only_arrays(go, view):
    def looked_at(array):
        seen = view(array)
        seen.flags.writeable = False
        return seen

    batches = [(looked_at(x.numpy().copy()), y.numpy()) for x, y in rows(mlp())]
    outcome = go(validation=batches, runtimes=NULL)
    assert not outcome.comparison.failed


@pytest.mark.parametrize("case", ["two_inputs", "two_outputs"])
def test_several_inputs_and_outputs(go, case):
    outcome = go(case=case, runtimes=ORT)
    assert not outcome.comparison.failed
    labels = {trial.candidate.label for trial in outcome.candidates}
    assert labels == {"float in eager", "int8 in onnxruntime", "float in onnxruntime"}
    inputs = [x.numpy() for x in CASES[case].data(rows=7, seed=9)]
    expected = CASES[case].build()(*(torch.from_numpy(x) for x in inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for trial in outcome.candidates:
        answers = trial.load()(*inputs)
        answers = answers if isinstance(answers, tuple) else (answers,)
        assert [a.shape for a in answers] == [tuple(e.shape) for e in expected]
        if trial.precision == "float":
            for answer, wanted in zip(answers, expected, strict=True):
                np.testing.assert_allclose(answer, wanted.detach().numpy(), atol=1e-4)


def test_regression(go):
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    batches = [(x, model(x).detach() + 0.1 * torch.randn(20, 1)) for x in CASES["mlp"].data(rows=60)[0].split(20)]
    outcome = go(model, validation=batches, metric="r2", runtimes=ORT)
    assert outcome.baseline.report.metric.name == "metric.r2"
    assert outcome.baseline.artifact.manifest.signature.activation == "none"
    assert outcome.baseline.artifact.reference() is None
    assert not outcome.comparison.failed


def test_own_metric_by_function(go):
    def mean_score(outputs, targets):
        return float(outputs.mean())

    outcome = go(metric=mean_score)
    x = torch.cat([x for x, _ in rows(mlp())])
    assert outcome.best.report.metric.value == pytest.approx(mlp()(x).mean().item(), abs=1e-5)
    assert outcome.best.candidate.metric_name == "mean_score"


def test_a_model_in_training_mode_is_left_as_it_was(go):
    model = CASES["shared_relu"].build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outcome = go(model, case="shared_relu", runtimes=NULL)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not outcome.comparison.failed


def test_the_global_generators_are_left_alone(go):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    go(runtimes=NULL)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_later_run_of_the_same_name_is_noticed(go):
    first = go()
    with torch.no_grad():
        other = mlp()
        other[0].bias += 1
    go(other)
    with pytest.raises(CorruptArtifact, match="a later run"):
        first.best.load()


def test_one_run_of_a_name_at_a_time(go):
    def meddling(what, share):
        if share == 0.0:
            with pytest.raises(RegistryError, match="one run of 'model' at a time"):
                go()
            seen.append(what)

    seen = []
    go(progress=meddling)
    assert seen
    go()


def test_softmax_is_applied_once(go):
    class Probabilities(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x).softmax(dim=1)

    assert go().best.artifact.manifest.signature.activation == "softmax"
    outcome = go(Probabilities())
    assert outcome.best.artifact.manifest.signature.activation == "none"
    np.testing.assert_allclose(outcome.best.artifact.reference()["probabilities"].sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sede": 3}, UsageError, "unknown keyword 'sede'; did you mean 'seed'"),
        ({"seed": -1}, UsageError, "seed must be at least 0"),
        ({"threads": 0}, UsageError, "threads must be at least 1"),
        ({"batch": 0}, UsageError, "batch must be at least 1"),
        ({"metric": "mean_squared_error"}, UsageError, "higher must be better"),
        ({"metric": "top_accuracy"}, UsageError, "did you mean 'top5_accuracy'"),
        ({"runtimes": ("onxruntime",)}, UsageError, "did you mean 'onnxruntime'"),
        ({"name": "No Good"}, UsageError, "name"),
        ({"classes": ("a", "b")}, UsageError, "got 2"),
        ({"image": fettle.ImagePreprocess()}, UsageError, "224, 224"),
        ({"validation": 7}, UsageError, "split 'validation'"),
        ({"validation": []}, DataError, "split 'validation'"),
        ({"train": []}, DataError, "split 'train'"),
    ],
)
def test_refused_before_any_work(go, tmp_path, changes, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        go(**changes)
    assert not (tmp_path / "home" / "registry.db").exists()


def test_a_runtime_that_was_asked_for_and_is_not_installed(go, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.delitem(__import__("sys").modules, "fettle.runtime.openvino", raising=False)
    with pytest.raises(MissingExtra, match="pip install 'fettle-ml\\[openvino\\]'"):
        go(runtimes=("openvino",))


def test_class_names_may_be_a_list(go):
    outcome = go(classes=["a", "b", "c", "d"])
    assert outcome.best.artifact.manifest.signature.classes == ("a", "b", "c", "d")


def test_registering_again_makes_no_second_version_of_the_same(go, tmp_path):
    first, again = go(register=True), go(register=True)
    assert first.best.version == again.best.version == first.baseline.version == 1
    assert Artifact.open(again.best.artifact.root).digest == first.best.artifact.digest
