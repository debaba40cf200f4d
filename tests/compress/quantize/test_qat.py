from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.qat import QuantizationAware
from fettle.compress.step import Context
from fettle.core.errors import CaptureError, DataError, UsageError
from fettle.testing.models import CASES, FixedBatch
from fettle.testing.steps import answers, captured


@functools.cache
def labelled(name, *, batches=6, rows=32):
    """Batches with the model's own labels."""
    case = CASES[name]
    model, inputs = case.build(), [case.data(rows=rows, seed=200 + batch) for batch in range(batches)]
    return [(batch, answers(model, batch)[0].argmax(dim=-1)) for batch in inputs]


def context(name, **options):
    case = CASES[name]
    defaults = {
        "example": case.data(rows=2),
        "calibration": [inputs for inputs, _ in labelled(name)],
        "train": lambda: labelled(name),
        "device": "cpu",
    }
    return Context(**{**defaults, **options})


def apply(name, step=None, *, model=None, **options):
    step = step or QuantizationAware(epochs=2)
    return step.apply(captured(CASES[name]) if model is None else model, context(name, **options))


def shuffled(name):
    batches = labelled(name)
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]


def distance(name, model):
    """Mean divergence of the float model's answers from this one's, on rows that nobody trained on."""
    data = CASES[name].data(rows=200, seed=77)
    found, wanted = (functional.log_softmax(answers(net, data)[0], dim=-1) for net in (model, CASES[name].build()))
    return float(functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


# Learning


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_few_bits_come_nearer_to_float_than_without_training(optimizer, learn_scales):
    step = QuantizationAware(
        epochs=15,
        weight_bits=3,
        optimizer=optimizer,
        learning_rate=3e-3 if optimizer == "adamw" else 0.05,
        learn_scales=learn_scales,
    )
    before = distance("mlp", PostTraining(weight_bits=3).apply(captured(CASES["mlp"]), context("mlp")))
    assert distance("mlp", apply("mlp", step)) < 0.6 * before


def signs(x):
    """Four classes: the signs of two differences between channels."""
    return 2 * (x[:, 0] > x[:, 1]).float().mean(dim=(1, 2)).round().long() + (x[:, 2].mean(dim=(1, 2)) > 0).long()


@functools.cache
def signed_batches():
    batches = [CASES["residual"].data(rows=64, seed=300 + batch) for batch in range(12)]
    return [(inputs, signs(inputs[0])) for inputs in batches]


@functools.cache
def trained_in_float():
    """The residual model after it has learned `signs`: one that has something to lose."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = CASES["residual"].build().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(12):
            for inputs, targets in signed_batches():
                optimizer.zero_grad()
                functional.cross_entropy(model(*inputs), targets).backward()
                optimizer.step()
    return model.eval()


def agreement(model):
    """With the trained float model, on rows that nobody trained on."""
    data = CASES["residual"].data(rows=1000, seed=78)
    found, wanted = (answers(net, data)[0].argmax(dim=1) for net in (model, trained_in_float()))
    return float((found == wanted).float().mean())


SGD = {"optimizer": "sgd", "learning_rate": 0.05}


@pytest.mark.parametrize("norm_epochs", [0, 4])
@pytest.mark.parametrize(
    "chosen",
    [{"loss": "labels"}, {"loss": "teacher"}, {"loss": "both"}, {"learn_scales": True}, SGD],
    ids=["labels", "teacher", "both", "learned scales", "sgd"],
)
def test_two_bits_regain_what_rounding_lost(chosen, norm_epochs):
    options = {"train": signed_batches, "calibration": [inputs for inputs, _ in signed_batches()]}
    plain = PostTraining(weight_bits=2).apply(trained_in_float(), context("residual", **options))
    step = QuantizationAware(
        **{"epochs": 8, "weight_bits": 2, "learning_rate": 5e-3, "norm_epochs": norm_epochs, **chosen}
    )
    found = agreement(apply("residual", step, model=trained_in_float(), **options))
    assert 1 - found < 0.75 * (1 - agreement(plain))


def test_real_targets_are_learned():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0], x[:, 1], x[:, 2], x[:, 3]], dim=1)

    def error(model):
        return float((model(x) - y).square().mean())

    def train():
        return [((x,), y)] * 10

    step = QuantizationAware(epochs=5, learning_rate=0.01, loss="labels")
    model = apply("mlp", step, train=train, calibration=[(x,)])
    with torch.no_grad():
        assert error(model) < 0.5 * error(CASES["mlp"].build())


# What comes out


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_model_trains_and_lowers(name, learn_scales):
    step = QuantizationAware(epochs=2, learn_scales=learn_scales, norm_epochs=1)
    trained = apply(name, step)
    case = CASES[name]
    assert isinstance(trained, Simulated)
    assert {type(module) for module in trained.layers().values()} == {SimulatedLayer}
    assert {type(module) for module in trained.quantizers().values()} == {ActivationQuantizer}
    assert not any(value.requires_grad for value in (*trained.parameters(), *trained.buffers()))
    assert not any(module.training for module in trained.modules())
    simulated, lowered = answers(trained, case.data(rows=16)), answers(trained.lowered(), case.data(rows=16))
    for want, have in zip(simulated, lowered, strict=True):
        # A bias in int32 may round an activation to the next step.
        torch.testing.assert_close(have, want, atol=0.05 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_weights_have_the_bits_that_were_asked_for(bits):
    trained = apply("residual", QuantizationAware(epochs=1, weight_bits=bits))
    for layer in trained.layers().values():
        whole = layer.deployed()[0]
        assert int(whole.abs().max()) <= 2 ** (bits - 1) - 1


def scales_in(model):
    layers = [layer.scales for layer in model.layers().values()]
    return torch.cat([*layers, *(quantizer.scale.reshape(1) for quantizer in model.quantizers().values())])


def test_learned_scales_move_and_stay_positive():
    start = scales_in(PostTraining(weight_bits=4).apply(captured(CASES["mlp"]), context("mlp")))
    step = QuantizationAware(epochs=3, weight_bits=4, learn_scales=True, optimizer="sgd", learning_rate=10.0)
    found = scales_in(apply("mlp", step))
    assert bool((found >= start / 64.01).all())
    assert not torch.equal(found, start)


def test_nothing_follows_where_nothing_may():
    plain = PostTraining().apply(captured(CASES["mlp"]), context("mlp"))
    trained = apply("mlp", QuantizationAware(epochs=1, follow_epochs=0))
    assert torch.equal(scales_in(trained), scales_in(plain))
    assert not torch.equal(scales_in(apply("mlp", QuantizationAware(epochs=1, follow_epochs=1))), scales_in(plain))


def test_the_given_model_and_its_mode_stay_as_they_are():
    model = CASES["norm_first"].build()
    model.head.train()
    before = copy.deepcopy(model.state_dict())
    apply("norm_first", QuantizationAware(epochs=1, learning_rate=0.01), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.training
    assert not model.layer.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# From a model that is quantized already


def test_a_quantized_model_goes_on_from_where_it_is():
    plain = PostTraining(weight_bits=3).apply(captured(CASES["mlp"]), context("mlp"))
    before = copy.deepcopy(plain.state_dict())
    trained = apply("mlp", QuantizationAware(epochs=10, learning_rate=3e-3), model=plain, calibration=())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert {layer.highest for layer in trained.layers().values()} == {3}
    assert distance("mlp", trained) < 0.7 * distance("mlp", plain)


def test_a_quantized_model_can_be_given_other_bits():
    plain = PostTraining().apply(captured(CASES["residual"]), context("residual"))
    trained = apply("residual", QuantizationAware(epochs=1, weight_bits=4), model=plain, calibration=())
    assert {layer.highest for layer in trained.layers().values()} == {7}
    assert {layer.highest for layer in plain.layers().values()} == {127}


@pytest.mark.parametrize("bits", [None, 4])
def test_corrections_before_training_are_kept_in_it(bits):
    plain = PostTraining(weight_bits=4).apply(captured(CASES["mlp"]), context("mlp"))
    for layer in plain.layers().values():
        layer.shift_bias(torch.full((layer.weight.shape[0],), 0.5))
        layer.integers, layer.scales = (layer.deployed()[0].int() + 1).clamp(-7, 7), 1.1 * layer.scales
    rows = CASES["mlp"].data(rows=8)
    # No epoch beats the start, so what comes back is where training started.
    trained = apply("mlp", QuantizationAware(epochs=1, weight_bits=bits), model=plain, score=lambda model: 0.0)
    torch.testing.assert_close(answers(trained, rows)[0], answers(plain, rows)[0])


# Validation, progress, going on


def test_the_best_epoch_is_kept_and_told():
    notes, seen = [], []
    given = iter((0.5, 0.4, 0.7, 0.6))

    def score(model):
        seen.append(answers(model, CASES["residual"].data(rows=8))[0])
        return next(given)

    trained = apply("residual", QuantizationAware(epochs=3, norm_epochs=1), score=score, note=notes.append)
    assert torch.equal(answers(trained, CASES["residual"].data(rows=8))[0], seen[2])
    assert notes[-1] == ("quantization-aware training: epoch 2 of 3 was kept, score 0.7000 (0.5000 before training)")


def test_a_training_that_only_harms_changes_nothing():
    given = iter((0.9, 0.1, 0.2))
    notes = []
    trained = apply("mlp", score=lambda model: next(given), note=notes.append)
    plain = PostTraining().apply(captured(CASES["mlp"]), context("mlp"))
    assert torch.equal(answers(trained, CASES["mlp"].data(rows=8))[0], answers(plain, CASES["mlp"].data(rows=8))[0])
    assert "no epoch beat the start" in notes[-1]


def test_what_is_scored_can_be_lowered():
    lowered = []

    def score(model):
        lowered.append(model.lowered())
        return 1.0

    apply("residual", QuantizationAware(epochs=1, norm_epochs=1), score=score)
    assert len(lowered) == 2, "once before training, once after the epoch"


def test_progress_rises_to_one():
    shares = []
    apply("residual", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] == 1.0


def interrupted(name, epoch):
    passes = iter(range(100))

    def loader():
        number = next(passes)
        for index, batch in enumerate(shuffled(name)):
            if number == epoch and index == 2:
                raise KeyboardInterrupt
            yield batch

    return loader


@pytest.mark.parametrize("epoch", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_epochs": 2, "follow_epochs": 3}, {"learn_scales": True, "optimizer": "sgd", "norm_epochs": 3}],
)
def test_it_goes_on_to_the_same_weights(tmp_path, options, epoch):
    step = QuantizationAware(epochs=4, weight_bits=4, learning_rate=1e-3, **options)

    def train():
        return iter(shuffled("residual"))

    whole = apply("residual", step, train=train)
    with pytest.raises(KeyboardInterrupt):
        apply("residual", step, train=interrupted("residual", epoch), checkpoint=tmp_path)
    notes = []
    again = apply("residual", step, train=train, checkpoint=tmp_path, note=notes.append)
    assert same(again, whole)
    assert any(f"went on after epoch {epoch - 1} of 4" in note for note in notes) == (epoch > 1)


def test_another_model_does_not_take_over_a_checkpoint(tmp_path):
    step = QuantizationAware(epochs=1)
    apply("mlp", step, checkpoint=tmp_path)
    other = CASES["mlp"].build(seed=1)
    wanted = apply("mlp", step, model=other)
    assert same(apply("mlp", step, model=other, checkpoint=tmp_path), wanted)
    assert len(list(tmp_path.iterdir())) == 2


def test_it_works_without_gradients_around_it():
    with torch.no_grad():
        trained = apply("residual", QuantizationAware(epochs=1, learning_rate=0.01))
    assert same(trained, apply("residual", QuantizationAware(epochs=1, learning_rate=0.01)))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"weight_bits": 1}, "weight_bits must be 2 to 8, got 1"),
        ({"weight_bits": 9}, "weight_bits must be 2 to 8, got 9"),
        ({"follow_epochs": -1}, "follow_epochs must be zero or more, got -1"),
        ({"norm_epochs": -1}, "norm_epochs must be zero or more, got -1"),
        ({"loss": "cross_entropy"}, 'loss must be "labels", "teacher" or "both", got \'cross_entropy\''),
        ({"optimizer": "lion"}, 'optimizer must be "adamw" or "sgd"'),
        ({"batches": 0}, "batches must be at least 1, got 0"),
    ],
)
def test_what_cannot_mean_anything_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        QuantizationAware(**options)


def test_without_labelled_batches_it_says_what_to_give():
    with pytest.raises(UsageError, match=r"give Context\(train=...\).*or use quantize.post_training"):
        apply("mlp", train=None)


@pytest.mark.parametrize("step", [QuantizationAware(epochs=1, loss=kind) for kind in ("labels", "both")])
def test_a_label_out_of_range_is_named(step):
    batches = [(inputs, torch.full_like(targets, 4)) for inputs, targets in labelled("mlp")]
    with pytest.raises(DataError, match="epoch 1, batch 0: targets must be class numbers 0 to 3, got 4"):
        apply("mlp", step, train=lambda: batches)


def test_a_rate_that_diverges_is_an_error_that_names_it():
    step = QuantizationAware(epochs=30, optimizer="sgd", learning_rate=1e9, loss="labels")
    with pytest.raises(DataError, match=r"epoch \d+.*must stay finite"):
        apply("mlp", step)


def test_a_model_that_cannot_be_captured_is_an_error():
    x = torch.randn(2, 8)
    with pytest.raises(CaptureError):
        QuantizationAware().apply(FixedBatch(), Context(example=(x,), calibration=[(x,)], train=list, device="cpu"))


def test_a_model_with_nothing_to_quantize_comes_back_as_it_is():
    notes, shares = [], []
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = QuantizationAware().apply(
        nn.Sequential(nn.ReLU()),
        Context(example=(x,), train=lambda: [((x,), x)], note=notes.append, progress=shares.append, device="cpu"),
    )
    assert torch.equal(found(x), x.relu())
    assert "nothing was quantized" in notes[0]
    assert shares[-1] == 1.0


def test_a_missing_gpu_is_an_error_before_any_work():
    with pytest.raises(UsageError, match="this machine has"):
        apply("mlp", device="cuda:99", calibration=())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("norm_epochs", [0, 4])
def test_it_trains_on_a_gpu_and_comes_back_to_the_cpu(norm_epochs, learn_scales):
    options = {"train": signed_batches, "calibration": [inputs for inputs, _ in signed_batches()]}
    plain = PostTraining(weight_bits=2).apply(trained_in_float(), context("residual", **options))
    step = QuantizationAware(
        epochs=8, weight_bits=2, learning_rate=5e-3, norm_epochs=norm_epochs, learn_scales=learn_scales
    )
    trained = apply("residual", step, model=trained_in_float(), device="cuda", score=agreement, **options)
    assert {value.device.type for value in trained.state_dict().values()} == {"cpu"}
    assert 1 - agreement(trained) < 0.75 * (1 - agreement(plain))
