from __future__ import annotations

import inspect
import tracemalloc
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fettle.compress.quantize import calibrate
from fettle.compress.quantize.calibrate import collect_ranges
from fettle.core.errors import DataError, UsageError

OBSERVERS = ["entropy", "histogram_mse", "min_max", "moving_average", "percentile"]


class Net(nn.Module):
    """A layer of every kind that makes trouble: shared, functional, never reached, of varying size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 4)
        self.auxiliary = nn.Linear(4, 2)
        self.asked_for_auxiliary = False

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.drop(x).mean((2, 3))
        x = self.head(self.relu(self.head(x)))
        return self.auxiliary(x) if self.asked_for_auxiliary else x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images(generator):
    return [torch.randn(n, 3, size, size, generator=generator) for n, size in ((4, 8), (1, 5), (7, 12), (2, 8))]


def snapshot(model):
    """Everything a caller could see changed: flags, hooks, gradients, values."""
    return [
        (
            name,
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            [None if p.grad is None else p.grad.tolist() for p in module.parameters(recurse=False)],
            [value.tolist() for value in (*module.parameters(recurse=False), *module.buffers(recurse=False))],
        )
        for name, module in model.named_modules()
    ]


def outputs_slowly(model, layer, batches):
    """All outputs of one layer, kept and joined."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *parts: kept.append(parts[2].flatten()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return torch.cat(kept)


def test_every_chosen_layer_gets_the_range_of_all_its_outputs(net, images):
    ranges = collect_ranges(net, images, observer="min_max", unreached="omit")
    assert list(ranges) == ["conv", "head"]
    for name, (low, high) in ranges.items():
        values = outputs_slowly(net, name, images)
        assert (low, high) == (min(values.min().item(), 0.0), max(values.max().item(), 0.0))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("levels", [16, 256])
def test_every_observer_can_be_asked(net, images, observer, levels):
    ranges = collect_ranges(net, images, types=(nn.ReLU, nn.Conv2d), observer=observer, levels=levels)
    assert list(ranges) == ["conv", "relu"]
    whole = collect_ranges(net, images, types=(nn.ReLU, nn.Conv2d), observer="min_max")
    for name, (low, high) in ranges.items():
        assert whole[name][0] <= low <= 0.0 <= high <= whole[name][1]
    assert ranges["relu"][0] == 0.0


@pytest.mark.parametrize(
    ("types", "names"),
    [
        (nn.ReLU, ["relu"]),
        ((nn.ReLU,), ["relu"]),
        ((nn.BatchNorm2d, nn.Dropout), ["norm", "drop"]),
        (nn.modules.conv._ConvNd, ["conv"]),
        ((nn.Conv2d, nn.Conv2d, nn.ReLU), ["conv", "relu"]),
        (Net, [""]),
    ],
)
def test_types_are_the_callers_choice_and_subclasses_count(net, images, types, names):
    assert list(collect_ranges(net, images, types=types)) == names


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_the_model_is_left_as_it_was(net, images, mode):
    net.train(mode == "train")
    if mode == "mixed":
        net.norm.train()
    net.head.weight.requires_grad_(False)
    net(images[0]).sum().backward()
    handle = net.conv.register_forward_hook(lambda *_: None)
    before = snapshot(net)
    collect_ranges(net, images, unreached="omit")
    assert snapshot(net) == before
    handle.remove()


def test_it_runs_in_evaluation_mode_without_gradients(images):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x):
            seen.append((self.training, self.layer.training, torch.is_grad_enabled()))
            return self.layer(x)

    spy = Spy().train()
    collect_ranges(spy, images[:1])
    assert seen == [(False, False, False)]
    assert spy.training
    assert torch.is_grad_enabled()


class Boom(Exception):
    pass


def broken_loader(images):
    yield images[0]
    raise Boom("the disk is gone")


def test_hooks_go_even_when_the_loader_raises(net, images):
    net.train()
    before = snapshot(net)
    with pytest.raises(Boom, match="disk is gone"):
        collect_ranges(net, broken_loader(images))
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 5, 8, 8), r"batch 1: the model raised RuntimeError: .*expected input.*without targets"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"batch 1: the model raised TypeError.*inputs alone"),
        ({"x": torch.zeros(2, 3, 8, 8)}, r"batch 1: calibration batches must be a tensor or a tuple.*got dict"),
        ((torch.zeros(2, 3, 8, 8), 3), r"batch 1: calibration batches must be.*got tuple"),
        (None, r"batch 1: calibration batches must be.*got NoneType"),
        (torch.full((2, 3, 8, 8), float("nan")), r"batch 1, the output of layer 'conv': .*must stay finite"),
        (torch.full((2, 3, 8, 8), float("inf")), r"batch 1, the output of layer 'conv': .*must stay finite"),
    ],
    ids=["channels", "targets too", "dictionary", "number", "none", "nan", "infinity"],
)
def test_a_bad_batch_is_named_and_the_model_left_as_it_was(net, images, bad, message):
    net.train()
    before = snapshot(net)
    with pytest.raises(DataError, match=message):
        collect_ranges(net, [images[0], bad], unreached="omit")
    assert snapshot(net) == before


def test_nan_is_told_of_the_layer_where_it_starts(net, images):
    net.head.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"batch 0, the output of layer 'head'.*nan"):
        collect_ranges(net, images, types=(nn.Conv2d, nn.ReLU, nn.Linear))


@pytest.mark.parametrize("empty", [[], (), iter(()), (x for x in ())])
def test_an_empty_set_is_an_error(net, empty):
    with pytest.raises(DataError, match="at least one batch, got none"):
        collect_ranges(net, empty)


def test_a_layer_never_reached_is_named(net, images):
    with pytest.raises(DataError, match=r"got none in 4 batches for: auxiliary\. .*unreached='omit'"):
        collect_ranges(net, images)
    assert "auxiliary" not in collect_ranges(net, images, unreached="omit")
    net.asked_for_auxiliary = True
    assert "auxiliary" in collect_ranges(net, images)


def test_a_layer_that_saw_only_empty_tensors_was_not_reached(generator):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(3, 2)
            self.rest = nn.Linear(3, 2)

        def forward(self, x):
            chosen = x[:, 0] > 10
            return self.expert(x[chosen]).sum() + self.rest(x[~chosen]).sum()

    x = torch.randn(6, 3, generator=generator)
    with pytest.raises(DataError, match="for: expert"):
        collect_ranges(Gate(), [x])
    assert list(collect_ranges(Gate(), [x], unreached="omit")) == ["rest"]
    assert list(collect_ranges(Gate(), [x, x + 20])) == ["expert", "rest"]


def test_a_transformer_layer_takes_no_fast_path_around_the_hooks(generator):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 5, 8, generator=generator)
    with pytest.raises(DataError, match=r"for: self_attn\.out_proj"):
        collect_ranges(layer, [x])
    assert list(collect_ranges(layer, [x], unreached="omit")) == ["linear1", "linear2"]


def test_no_layer_of_the_types_is_an_error_that_says_what_there_is(net, images):
    with pytest.raises(UsageError, match="got LSTM; it holds BatchNorm2d, Conv2d, Dropout, Linear, Net, ReLU"):
        collect_ranges(net, images, types=nn.LSTM)


@pytest.mark.parametrize("types", [(), "Linear", ("Linear",), (int,), [nn.Linear], nn.Linear(1, 1)])
def test_types_must_be_module_types(net, images, types):
    with pytest.raises(UsageError, match="types must be one or more subclasses"):
        collect_ranges(net, images, types=types)


def test_wrong_options_are_refused_before_anything_runs(net):
    def never():
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(UsageError, match="limit must be at least 1 batch, got 0"):
        collect_ranges(net, never(), limit=0)
    with pytest.raises(UsageError, match="did you mean 'min_max'"):
        collect_ranges(net, never(), observer="minmax")
    with pytest.raises(UsageError, match="levels must be 2 to 65536"):
        collect_ranges(net, never(), levels=1)
    with pytest.raises(UsageError, match="unreached must be 'error' or 'omit'"):
        collect_ranges(net, never(), unreached="ignore")


@pytest.mark.parametrize(("limit", "read"), [(1, 1), (3, 3), (100, 4)])
def test_the_limit_is_all_that_is_read(net, images, limit, read):
    count = 0

    def counting():
        nonlocal count
        for batch in images:
            count += 1
            yield batch

    ranges = collect_ranges(net, counting(), limit=limit, observer="min_max", unreached="omit")
    assert count == read
    assert ranges == collect_ranges(net, images[:read], observer="min_max", unreached="omit")


def test_the_default_limit_is_a_hundred():
    assert inspect.signature(collect_ranges).parameters["limit"].default == 100


def test_batches_may_be_tuples_of_several_inputs(generator):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.layer(x + y)

    x = torch.randn(4, 3, generator=generator)
    assert collect_ranges(Two(), [(x, x), [x, -x]]).keys() == {"layer"}


def test_a_layer_used_twice_sees_both_uses(generator):
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    assert list(collect_ranges(model, [torch.randn(3, 2, generator=generator)], types=nn.ReLU)) == ["1"]
    x = torch.randn(30, 2, generator=generator)
    both = torch.cat([model[:2](x), model(x)]).max().item()
    assert collect_ranges(model, [x], types=nn.ReLU, observer="min_max")["1"] == (0.0, both)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, None), lambda x: [x, x * 9], lambda x: {"first": x}, lambda x: (None, (x,)), lambda x: x],
)
def test_of_several_outputs_the_first_tensor_counts(wrap, generator):
    class Wrapped(nn.Module):
        def forward(self, x):
            return wrap(x)

    x = torch.randn(9, 2, generator=generator)
    ranges = collect_ranges(nn.Sequential(OrderedDict(w=Wrapped())), [x], types=Wrapped, observer="min_max")
    assert ranges == {"w": (x.min().item(), x.max().item())}


@pytest.mark.parametrize(("made", "got"), [(None, "no tensor"), ((), "no tensor"), (torch.ones(2) * 1j, "complex64")])
def test_an_output_without_real_values_is_an_error(made, got):
    class Odd(nn.Module):
        def forward(self, x):
            return made

    with pytest.raises(DataError, match=f"batch 0, the output of layer 'odd' must hold a real tensor, got .*{got}"):
        collect_ranges(nn.Sequential(OrderedDict(odd=Odd())), [torch.ones(1)], types=Odd)


def test_python_memory_does_not_grow_with_the_batches(generator):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())

    def peak_bytes(count):
        tracemalloc.start()
        collect_ranges(model, (torch.ones(32, 64) * i for i in range(count)), limit=count)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    def least(count):
        """Other threads of the process allocate too, now and then; what a batch keeps is there each time."""
        return min(peak_bytes(count) for _ in range(3))

    assert least(300) <= least(10) * 1.1 + 4096


def test_the_public_names():
    assert calibrate.__all__ == ["Observer", "collect_ranges"]
