"""The steps that follow PostTraining: bias correction, adaptive rounding, wide sums, layers given back to float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fettle.compress.quantize.adaround import AdaRound, second_moments
from fettle.compress.quantize.bias_correction import BiasCorrection
from fettle.compress.quantize.give_back import GiveBack
from fettle.compress.quantize.graph.lockstep import affordable_rows, gather, run_lockstep
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.wide_sums import WideSums
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured, context_for

STEPS = (BiasCorrection(), AdaRound(), WideSums(), GiveBack())
NAMES = ("residual", "grouped", "norm_first", "conv1d", "same_padding", "tied_weights", "two_inputs")


def quantized(name, **options):
    case = CASES[name]
    return PostTraining(**options).apply(captured(case), context_for(case))


def error(model, other, data):
    return sum(float((a - b).square().mean()) for a, b in zip(answers(model, data), answers(other, data), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_lockstep_sees_both_models_as_they_are(name):
    case = CASES[name]
    model, simulated = case.build(), quantized(name)
    data = case.data(rows=16, seed=7)
    seen = []
    before, after = run_lockstep(simulated, data, lambda moment: seen.append(moment.layer))
    for found, whole in ((before, answers(model, data)), (after, answers(simulated, data))):
        parts = found if isinstance(found, tuple | list) else (found,)
        for have, want in zip(parts, whole, strict=True):
            torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
    assert seen == list(simulated.layers().values())


@pytest.mark.parametrize("name", NAMES)
def test_bias_correction_leaves_no_mean_error_in_any_layer(name):
    case = CASES[name]
    simulated = quantized(name, weight_bits=5)
    data = tuple(torch.cat(parts) for parts in zip(*(case.data(rows=32, seed=100 + i) for i in range(4)), strict=True))
    corrected = BiasCorrection().apply(simulated, context_for(case))
    wrong = {}

    def look(moment):
        axes = [axis for axis, size in enumerate(moment.layer.channels(moment.wrote.ndim)) if size == 1]
        error = (moment.wrote - moment.wrote_in_float).mean(dim=axes)
        wrong.setdefault(moment.layer, float(error.abs().max() / moment.wrote_in_float.std()))

    run_lockstep(corrected, data, look)
    assert max(wrong.values()) < 1e-4


@pytest.mark.parametrize("name", ["residual", "grouped", "mlp", "squeeze_excite", "norm_last"])
def test_adaptive_rounding_wins_at_four_bits(name):
    case = CASES[name]
    model, simulated = case.build(), quantized(name, weight_bits=4)
    data = case.data(rows=256, seed=3)
    assert error(model, AdaRound().apply(simulated, context_for(case)), data) < 0.8 * error(model, simulated, data)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, dilation=2),
        nn.Conv2d(4, 8, (1, 3), groups=2, padding=(0, 1)),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv1d(4, 6, 3, padding="same"),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_second_moments_are_those_of_what_meets_the_weights(layer):
    """By definition: perturb one weight at a time, and see by how much the output moves."""
    shape = (6, 4, 7, 5) if isinstance(layer, nn.Conv2d) else (6, 4, 9) if isinstance(layer, nn.Conv1d) else (6, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    simulated = PostTraining().apply(nn.Sequential(layer).eval(), Context(example=(x,), calibration=[(x,)]))
    (inner,) = simulated.layers().values()
    found = second_moments(inner, x, chunk_rows=4)
    groups, width = found.shape[:2]
    each = layer.weight.shape[0] // groups
    for group in range(groups):
        patches = []
        for index in range(width):
            probe = copy.deepcopy(layer)
            with torch.no_grad():
                probe.weight.zero_()
                probe.weight[group * each].flatten()[index] = 1.0
                moved = probe(x) - probe.bias.reshape(-1, *[1] * (x.ndim - 2))
            channel = moved[:, group * each] if x.ndim > 2 else moved[:, group * each, None]
            patches.append(channel.flatten().double())
        rows = torch.stack(patches, dim=1)
        rows = rows - rows.mean(dim=0)
        torch.testing.assert_close(found[group], rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_too_wide_is_rounded_to_nearest_and_named():
    case, notes = CASES["mlp"], []
    context = Context(example=case.data(rows=1), calibration=[case.data(rows=8)], note=notes.append)
    found = AdaRound(width_limit=16).apply(quantized("mlp"), context)
    assert any("2: weights are rounded to nearest: 32" in note for note in notes)
    assert [layer.integers is None for layer in found.layers().values()] == [False, True, True]


def test_wide_sums_leave_the_last_layer_of_a_sum_unrounded():
    simulated = quantized("residual", small_share=0.0)
    wide = WideSums().apply(simulated, context_for(CASES["residual"]))
    gone = {node.name for node in simulated.quantizers()} - {node.name for node in wide.quantizers()}
    assert len(gone) == 1
    data = CASES["residual"].data(rows=128, seed=9)
    assert error(CASES["residual"].build(), wide, data) < error(CASES["residual"].build(), simulated, data)


class _TwoSides(nn.Module):
    """A sum of two layers, as in a ResNet's projection shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.last = (
            nn.Conv2d(3, 4, 1) if i == 0 else nn.Conv2d(4, 4, 1) for i in range(4)
        )

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((self.left(x) + self.right(x)).relu())


def test_of_two_layers_in_a_sum_one_stays_rounded():
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    context = Context(example=(x,), calibration=[(x,)])
    simulated = PostTraining().apply(_TwoSides().eval(), context)
    wide = WideSums().apply(simulated, context)
    assert len(simulated.quantizers()) - len(wide.quantizers()) == 1
    rounded = {quantizer.layer for quantizer in wide.quantizers().values()}
    assert "left" in rounded
    assert "right" not in rounded


@pytest.mark.parametrize("name", ["residual", "grouped", "norm_first", "two_outputs"])
def test_giving_every_layer_back_is_float(name):
    case = CASES[name]
    simulated = quantized(name, weight_bits=3)
    layers = tuple(dict.fromkeys(layer.layer for layer in simulated.layers().values()))
    notes = []
    context = Context(example=case.data(rows=1), note=notes.append)
    found = GiveBack(layers=layers).apply(simulated, context)
    assert not found.layers()
    assert len(notes) == len(layers)
    data = case.data(rows=64, seed=4)
    assert error(case.build(), found, data) < 0.05 * error(case.build(), simulated, data)


def test_giving_one_layer_back_undoes_its_correction_and_its_rounding():
    case = CASES["residual"]
    coarse = AdaRound().apply(quantized("residual", weight_bits=3), context_for(case))
    found = GiveBack(layers=("conv1",)).apply(coarse, context_for(case))
    assert len(found.layers()) == len(coarse.layers()) - 1
    data = case.data(rows=64, seed=4)
    assert error(case.build(), found, data) < error(case.build(), coarse, data)


def test_a_layer_to_give_back_must_be_there():
    with pytest.raises(UsageError, match=r"no layer in integers is called 'conv9'. There are: conv1, conv2"):
        GiveBack(layers=("conv9",)).apply(quantized("residual"), context_for(CASES["residual"]))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.step_name())
def test_a_model_that_is_not_quantized_is_refused(step):
    case = CASES["mlp"]
    with pytest.raises(UsageError, match=r"corrects a quantized model, got Sequential: put quantize.post_training"):
        step.apply(case.build(), context_for(case))


@pytest.mark.parametrize("step", [BiasCorrection(), AdaRound()], ids=lambda step: step.step_name())
def test_no_calibration_data_is_an_error(step):
    case = CASES["mlp"]
    with pytest.raises(DataError, match="at least one row"):
        step.apply(quantized("mlp"), Context(example=case.data(rows=1)))


@pytest.mark.parametrize(
    "build", [lambda: BiasCorrection(rows=0), lambda: AdaRound(rows=0), lambda: AdaRound(width_limit=0)]
)
def test_counts_must_be_positive(build):
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        build()


def test_rows_are_gathered_over_batches_and_bounded_by_memory():
    batches = [(torch.full((3, 2), float(i)),) for i in range(4)]
    (rows,) = gather(batches, rows=7)
    assert rows[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    simulated = quantized("residual")  # its largest tensor is 8 × 8 × 8 float32
    assert affordable_rows(simulated, rows=512) == 512
    assert affordable_rows(simulated, rows=512, limit_bytes=10 * 8 * 8 * 8 * 4) == 10
    assert affordable_rows(simulated, rows=512, limit_bytes=1) == 1


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-30])
def test_a_channel_whose_weights_have_vanished_keeps_its_bias(size):
    """Steps as fine as its weights would need a bias beyond int32."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] *= size
        model[0].bias[1] = 0.7
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    simulated = PostTraining().apply(model, Context(example=(x,), calibration=[(x,)]))
    torch.testing.assert_close(simulated.lowered()(x), simulated(x), atol=0.02, rtol=0.02)
    torch.testing.assert_close(simulated.lowered()(x), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("step", [AdaRound(), BiasCorrection()])
def test_nan_in_calibration_data_is_refused(step):
    case = CASES["mlp"]
    quantized = PostTraining().apply(captured(case), context_for(case))
    (x,) = case.data(rows=8)
    x[3, 0] = float("nan")
    with pytest.raises(DataError, match="calibration batch 1 must be finite, got NaN or infinity"):
        step.apply(quantized, Context(example=(x[:2],), calibration=[case.data(rows=8), (x,)]))
