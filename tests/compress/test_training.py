from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fettle.compress.losses import label_loss
from fettle.compress.plan import Group, Plan
from fettle.compress.step import Context
from fettle.compress.training import Outcome, Trainee, train
from fettle.core.errors import CorruptArtifact, DataError, UsageError
from fettle.core.recipe import StepSpec

SPEC = StepSpec(name="tiny", parameters={})


def build(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def rows(count=120):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :3] - x[:, 3:]).argmax(dim=1)


def shuffled():
    """As a DataLoader does, by the global generator."""
    x, y = rows()
    return [((x[part],), y[part]) for part in torch.randperm(len(x)).split(20)]


def accuracy(model):
    x, y = rows()
    return float((model(x).argmax(dim=1) == y).float().mean())


def trainee_of(model, **options):
    group = Group(tensors=list(model.parameters()), decay=True)
    return Trainee(model=model, groups=[group], **{"loss": lambda a, i, t: label_loss(a, t), **options})


def context(**options):
    defaults = {"train": shuffled, "score": accuracy, "device": "cpu"}
    return Context(example=(rows()[0][:1],), **{**defaults, **options})


def run(model=None, *, plan=None, spec=SPEC, hooks=None, **options):
    model = build() if model is None else model
    plan = plan or Plan(epochs=3, learning_rate=0.02)
    return model, train(trainee_of(model, **(hooks or {})), plan, context(**options), spec=spec)


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


# Learning


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_and_keeps_the_best(optimizer):
    model, outcome = run(plan=Plan(epochs=4, learning_rate=0.05, optimizer=optimizer))
    assert len(outcome.scores) == 5
    assert outcome.scores[outcome.best] == max(outcome.scores) > outcome.scores[0] + 0.2
    assert accuracy(model) == outcome.scores[outcome.best]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.5, 0.4, 0.3, 0.2), 0), ((0.1, 0.4, 0.4, 0.2), 1), ((-3.0, -2.0, -2.5, -1.0), 3), ((0.5, 0.5, 0.5, 0.5), 0)],
)
def test_the_first_of_the_highest_scores_is_kept(scores, best):
    given, seen = iter(scores), []

    def score(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(given)

    model, outcome = run(score=score)
    assert (outcome.best, outcome.scores) == (best, scores)
    assert all(torch.equal(value, seen[best][name]) for name, value in model.state_dict().items())


def test_without_a_score_the_last_epoch_is_kept():
    model, outcome = run(score=None)
    assert outcome == Outcome(best=3, scores=())
    assert not same(model, build())
    assert "last of 3" in outcome.sentence("training")


def test_the_model_that_is_scored_is_the_finished_one_in_evaluation_without_gradients():
    def score(model):
        assert isinstance(model, Wrapped)
        assert not model.training
        assert not torch.is_grad_enabled()
        return 0.5

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    run(score=score, hooks={"finished": lambda model: Wrapped(model).eval()})


def test_the_hooks_are_called_in_order():
    calls = []
    hooks = {"begin_epoch": lambda epoch: calls.append(epoch), "after_batch": lambda: calls.append("batch")}
    run(hooks=hooks, plan=Plan(epochs=2, learning_rate=0.01))
    assert calls == [0, *["batch"] * 6, 1, *["batch"] * 6]


def rates_of(loader, *, epochs=2, pace=1.0):
    """The learning rate of every batch, read off plain SGD on a loss with gradient one."""
    weight = nn.Parameter(torch.zeros(1))
    model = nn.Module()
    model.weight, model.forward = weight, lambda x: weight
    values = []
    trainee = Trainee(
        model=model,
        groups=[Group(tensors=[weight], pace=pace)],
        loss=lambda answer, inputs, targets: answer.sum(),
        after_batch=lambda: values.append(float(weight.detach())),
    )
    plan = Plan(epochs=epochs, learning_rate=0.1, optimizer="sgd")
    train(trainee, plan, Context(example=(torch.zeros(1),), train=loader, device="cpu"), spec=SPEC)
    # Nesterov momentum: v = 0.9 v + 1, w -= lr (1 + 0.9 v)
    rates, velocity, before = [], 0.0, 0.0
    for value in values:
        velocity = 0.9 * velocity + 1
        rates.append((before - value) / (1 + 0.9 * velocity))
        before = value
    return rates


def four():
    return [((torch.zeros(1),), torch.zeros(1))] * 4


@pytest.mark.parametrize("pace", [1.0, 0.01])
def test_the_rate_falls_along_a_cosine_batch_by_batch(pace):
    wanted = [pace * 0.1 * 0.5 * (1 + math.cos(math.pi * batch / 8)) for batch in range(8)]
    assert rates_of(four, pace=pace) == pytest.approx(wanted, rel=1e-3)


def test_where_nobody_knows_the_length_the_first_epoch_has_one_rate():
    wanted = [0.1] * 4 + [0.1 * 0.5 * (1 + math.cos(math.pi * batch / 8)) for batch in range(4, 8)]
    assert rates_of(lambda: iter(four())) == pytest.approx(wanted, rel=1e-3)


def test_progress_rises_to_one():
    shares = []
    run(progress=shares.append)
    assert shares == sorted(shares)
    assert len(set(shares)) > 15
    assert shares[-1] == 1.0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_and_leaves_float32(precision):
    model, outcome = run(plan=Plan(epochs=3, learning_rate=0.05, precision=precision))
    assert max(outcome.scores) > outcome.scores[0] + 0.2
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# Determinism


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator():
    results = []
    for attempt in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(attempt)
            results.append(run(seed=7)[0])
    assert same(*results)
    assert not same(results[0], run(seed=8)[0])


def test_the_callers_generator_and_gradient_mode_are_left_alone():
    state = torch.get_rng_state()
    with torch.no_grad():
        model, _ = run()
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, run()[0])


# Going on


def killed_in(epoch):
    """A loader that dies in the middle of this epoch, 1 the first; pass 0 is a look at the data."""
    passes = iter(range(100))

    def loader():
        number = next(passes)
        for index, batch in enumerate(shuffled()):
            if number == epoch and index == 3:
                raise KeyboardInterrupt
            yield batch

    return loader


PLAIN = Plan(epochs=4, learning_rate=0.02, weight_decay=0.01)


@pytest.mark.parametrize("plan", [PLAIN, replace(PLAIN, optimizer="sgd"), replace(PLAIN, precision="float16")])
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_training_goes_on_to_the_same_weights(tmp_path, epoch, plan):
    whole, wanted = run(plan=plan, train=lambda: iter(shuffled()))
    with pytest.raises(KeyboardInterrupt):
        run(plan=plan, train=killed_in(epoch), checkpoint=tmp_path)
    notes = []
    again, outcome = run(plan=plan, train=lambda: iter(shuffled()), checkpoint=tmp_path, note=notes.append)
    assert outcome == wanted
    assert same(again, whole)
    assert [f"after epoch {epoch - 1} of 4" in note for note in notes] == ([] if epoch == 1 else [True])


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    model, wanted = run(checkpoint=tmp_path)
    passes = []

    def loader():
        passes.append(1)
        return shuffled()

    again, outcome = run(train=loader, checkpoint=tmp_path)
    assert outcome == wanted
    assert same(again, model)
    assert len(passes) == 1, "one look at the data"


def relabeled():
    return [(inputs, (targets + 1) % 3) for inputs, targets in shuffled()]


def reread():
    *first, (inputs, targets) = shuffled()
    return [*first, (tuple(tensor + 1 for tensor in inputs), targets)]


OTHER_WORK = {
    "plan": {"plan": Plan(epochs=3, learning_rate=0.021)},
    "step": {"spec": StepSpec(name="tiny", parameters={"bits": 4})},
    "seed": {"seed": 1},
    "labels": {"train": relabeled},
    "later inputs": {"train": reread},
    "score": {"score": None},
    "model": {"seed_of_model": 1},
}


@pytest.mark.parametrize("what", OTHER_WORK)
def test_other_work_starts_anew_beside_the_old(tmp_path, what):
    options = dict(OTHER_WORK[what])
    run(checkpoint=tmp_path)
    notes = []
    seed = options.pop("seed_of_model", 0)
    fresh, wanted = run(build(seed), **options)
    model, outcome = run(build(seed), checkpoint=tmp_path, note=notes.append, **options)
    assert not notes
    assert outcome == wanted
    assert same(model, fresh)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(checkpoint=tmp_path)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="delete it to train from the start"):
        run(checkpoint=tmp_path)


def start(checkpoints: Path, output: Path, *, epochs: int, stop_in: int) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("train_tiny.py")
    arguments = [str(value) for value in (checkpoints, output, epochs, stop_in)]
    return subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_process_that_was_killed_goes_on_to_the_same_bytes(tmp_path, epoch):
    whole = start(tmp_path / "a", tmp_path / "whole", epochs=4, stop_in=0)
    # Pass 0 stops before its fourth batch, so a number to stop in counts epochs from 1.
    victim = start(tmp_path / "b", tmp_path / "part", epochs=4, stop_in=epoch)
    assert victim.stdout is not None
    for line in victim.stdout:  # the epoch's own output tells that it is in its middle
        if line.strip() == f"pass {epoch}":
            break
    victim.send_signal(signal.SIGKILL)
    assert victim.wait(timeout=60) == -signal.SIGKILL
    victim.stdout.close()
    assert not (tmp_path / "part").exists()
    wanted = finished(whole)
    out = finished(start(tmp_path / "b", tmp_path / "part", epochs=4, stop_in=-1))
    assert (f"went on after epoch {epoch - 1} of 4" in out) == (epoch > 1)
    assert out.splitlines()[-1] == wanted.splitlines()[-1]
    left, right = (safetensors.torch.load_file(tmp_path / name) for name in ("whole", "part"))
    assert all(torch.equal(left[name], right[name]) for name in left)


# Bad input


def test_training_needs_labelled_batches():
    with pytest.raises(UsageError, match=r"tiny trains and needs labelled batches: give Context\(train=...\)"):
        run(train=None)


@pytest.mark.parametrize("empty", [list, lambda: iter(())])
def test_an_empty_loader_is_an_error(empty):
    with pytest.raises(DataError, match="at least one batch"):
        run(train=empty)


def test_a_loader_that_is_used_up_is_an_error():
    batches = iter(shuffled())
    with pytest.raises(DataError, match="got none after an epoch with batches: `train` must return a fresh iterable"):
        run(train=lambda: batches)


def test_what_is_no_iterable_is_an_error():
    with pytest.raises(DataError, match=r"must return an iterable of \(inputs, targets\), got int"):
        run(train=lambda: 3)


def test_a_label_out_of_range_names_epoch_and_batch():
    batches = shuffled()
    batches[4] = (batches[4][0], batches[4][1] + 3)
    with pytest.raises(DataError, match="epoch 1, batch 4: targets must be class numbers 0 to 2, got"):
        run(train=lambda: batches)


def poisoned_after(batches):
    """A loss that is NaN after so many batches."""
    count = iter(range(1000))
    return lambda a, i, t: label_loss(a, t) * (float("nan") if next(count) >= batches else 1.0)


@pytest.mark.parametrize(("good", "where"), [(0, "epoch 1, batch 0"), (8, "epoch 2, batch 2")])
def test_a_loss_that_is_not_finite_names_epoch_and_batch_and_where_the_best_is(tmp_path, good, where):
    with pytest.raises(DataError, match=rf"{where}: the loss must stay finite, got nan: try a learning rate") as caught:
        run(hooks={"loss": poisoned_after(good)}, checkpoint=tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == (1 if good else 0)
    for path in files:
        assert str(path) in str(caught.value)
        best = safetensors.torch.load_file(path)
        assert torch.isfinite(best["best/0.weight"]).all()


def test_weights_that_diverge_in_the_last_batch_are_not_kept():
    model = build()

    def spoil():
        model[0].weight.data.fill_(float("inf"))

    with pytest.raises(DataError, match=r"epoch 1, batch 1|0\.weight must stay finite"):
        run(model, hooks={"after_batch": spoil}, train=lambda: shuffled()[:1])


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error(score):
    with pytest.raises(DataError, match="validation score must be a finite number"):
        run(score=lambda model: score)


# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_learns_on_a_gpu_and_is_scored_with_tensors_of_the_cpu(tmp_path):
    options = {"device": "cuda", "checkpoint": tmp_path}
    model, outcome = run(build().cuda(), **options)
    assert max(outcome.scores) > outcome.scores[0] + 0.2
    assert next(model.parameters()).device.type == "cuda"
    again, repeated = run(build().cuda(), **options)
    assert repeated == outcome
    assert same(again, model)
