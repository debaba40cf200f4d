"""What every observer must do, whichever it is; the plug-ins are found as the package finds them."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate import Observer
from fettle.core import plugins
from fettle.core.errors import DataError, UsageError

FOUND = plugins.installed("fettle.compress.quantize.calibrate", Observer)
STREAMING = {name: kind for name, kind in FOUND.items() if name not in ("min_max", "moving_average")}
every = pytest.mark.parametrize("kind", FOUND.values(), ids=FOUND)
streaming = pytest.mark.parametrize("kind", STREAMING.values(), ids=STREAMING)

BATCHES = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), min_size=1, max_size=12
)

DRAWS = {
    "normal": lambda g: torch.randn(4000, generator=g),
    "relu": lambda g: torch.randn(4000, generator=g).relu(),
    "negative": lambda g: -torch.randn(4000, generator=g).abs() - 1,
    "heavy tail": lambda g: torch.randn(4000, generator=g) ** 5,
    "outlier": lambda g: torch.cat([torch.randn(4000, generator=g), torch.tensor([100.0])]),
    "uniform": lambda g: torch.rand(4000, generator=g) * 7 - 2,
    "two values": lambda g: torch.randint(0, 2, (4000,), generator=g) * 3.0 - 1,
    "far away": lambda g: torch.randn(4000, generator=g) + 1e6,
    "tiny": lambda g: torch.randn(4000, generator=g) * 1e-42,
}
drawn = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def state_bytes(observer):
    return len(pickle.dumps(observer))


def test_all_are_found_by_file_name():
    assert sorted(FOUND) == ["entropy", "histogram_mse", "min_max", "moving_average", "percentile"]


@every
@settings(max_examples=40, deadline=None)
@given(batches=BATCHES)
def test_the_range_holds_zero_and_nothing_that_was_not_seen(kind, see, batches):
    low, high = see(kind(), *batches).range()
    # Averages and shrunk ends may round in the last place.
    assert min(0.0, min(map(min, batches))) * (1 + 1e-9) <= low <= 0.0
    assert 0.0 <= high <= max(0.0, max(map(max, batches))) * (1 + 1e-9)


@every
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 255, 256, 1024, 65536])
@drawn
def test_every_number_of_levels_gives_a_range(kind, see, draw, levels, generator):
    values = draw(generator)
    low, high = see(kind(levels), values).range()
    assert min(values.min().item(), 0.0) <= low <= 0.0 <= high <= max(values.max().item(), 0.0)
    assert low < high


@every
@pytest.mark.parametrize("levels", [1, 0, -256, 65537])
def test_impossible_levels_are_refused(kind, levels):
    with pytest.raises(UsageError, match=f"levels must be 2 to 65536.*got {levels}"):
        kind(levels)


@every
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-40, 3e38, -3e38, 1e-45])
@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_a_constant_is_covered(kind, see, value, levels):
    low, high = see(kind(levels), [value] * 5, [value]).range()
    assert low == pytest.approx(min(value, 0.0))
    assert high == pytest.approx(max(value, 0.0))


@every
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-42])
def test_a_single_value_is_enough(kind, value):
    observer = kind()
    observer.update(torch.tensor(value))
    assert observer.range() == pytest.approx((min(value, 0.0), max(value, 0.0)))


@every
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([0.0, 1e-6], [-1e6, 1e6]),
        ([0.0, 1e-30], [1e30]),
        ([1.0, 1.0 + 1e-6], [1e9]),
        ([0.0, 1e-44], [1.0]),
        ([-1e-40, 0.0], [3e38]),
        ([0.0, 1e-6], [-3e38]),
        ([1e6, 1e6], [1e-6]),
        ([-3e38], [3e38]),
        ([1e8, 1e8 + 8], [1e8 + 16, 0.0]),
    ],
)
def test_a_range_that_explodes_stays_within_what_was_seen(kind, see, first, then):
    low, high = see(kind(), first, then, first).range()
    assert min(*first, *then, 0.0) * (1 + 1e-6) <= low <= 0.0
    assert 0.0 <= high <= max(*first, *then, 0.0) * (1 + 1e-6)


@every
def test_one_sided_values_keep_the_range_at_zero(kind, see, generator):
    values = torch.rand(1000, generator=generator)
    assert see(kind(), values).range()[0] == 0.0
    assert see(kind(), -values).range()[1] == 0.0
    assert see(kind(), values + 10).range()[0] == 0.0
    assert see(kind(), values.sub(0.5).relu(), values.sub(0.9).relu()).range()[0] == 0.0


@every
def test_nothing_seen_is_an_error(kind, see):
    for observer in (kind(), see(kind(), []), see(kind(), torch.empty(0, 3, 4), [])):
        with pytest.raises(DataError, match="saw no value"):
            observer.range()


@every
def test_an_empty_batch_between_others_changes_nothing(kind, see):
    assert see(kind(), [1.0, 2.0], [], [3.0]).range() == see(kind(), [1.0, 2.0], [3.0]).range()


@every
def test_asking_early_changes_nothing(kind, see, generator):
    values = torch.randn(300, generator=generator)
    observer = see(kind(), values[:100])
    observer.range()
    observer.range()
    assert see(observer, values[100:]).range() == see(kind(), values[:100], values[100:]).range()


@every
def test_the_values_are_left_as_they_were(kind, see, generator):
    values = torch.randn(50, generator=generator)
    before = values.clone()
    see(kind(), values)
    assert torch.equal(values, before)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_what_is_not_finite_is_refused_and_nothing_is_lost(kind, see, bad, where, generator):
    values = torch.randn(200, generator=generator)
    observer = see(kind(), values)
    before = observer.range()
    broken = values * 10
    broken[where] = bad
    with pytest.raises(DataError, match="must stay finite in float32"):
        observer.update(broken)
    assert observer.range() == before
    assert see(observer, values * 2).range() == see(kind(), values, values * 2).range()


@every
def test_a_double_too_large_for_float32_is_refused(kind):
    with pytest.raises(DataError, match="finite in float32"):
        kind().update(torch.tensor([0.0, 1e39], dtype=torch.float64))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8])
def test_any_real_type_is_read(kind, see, dtype, generator):
    values = torch.randint(0, 100, (500,), generator=generator)
    observer = kind()
    observer.update(values.to(dtype))
    assert observer.range() == see(kind(), values.float()).range()


@every
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(2, 3, 5, 20),
        lambda x: x.reshape(2, 3, 5, 20).to(memory_format=torch.channels_last),
        lambda x: x.reshape(30, 20).t(),
        lambda x: x.repeat_interleave(2)[::2],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["4-d", "channels last", "transposed", "strided", "with gradient"],
)
def test_the_layout_does_not_matter(kind, see, change, generator):
    values = torch.randn(600, generator=generator)
    observer = kind()
    observer.update(change(values))
    assert observer.range() == see(kind(), values).range()


@every
def test_shapes_may_vary_from_batch_to_batch(kind, see, generator):
    values = torch.randn(600, generator=generator)
    parts = values.split([100, 200, 300])
    shaped = [parts[0].reshape(10, 10), parts[1].reshape(2, 5, 20), parts[2].reshape(1, 3, 10, 10)]
    assert see(kind(), *shaped).range() == see(kind(), *parts).range()


@every
@drawn
@pytest.mark.parametrize("power", [-20, 3, 40])
def test_scaling_by_a_power_of_two_scales_the_range(kind, see, draw, power, generator):
    values = draw(generator)
    if draw is DRAWS["tiny"] and power < 0:
        pytest.skip("denormals lose bits")
    low, high = see(kind(), *values.split(1000)).range()
    expected = (low * 2.0**power, high * 2.0**power)
    assert see(kind(), *(values * 2.0**power).split(1000)).range() == pytest.approx(expected, rel=1e-6)


@every
@drawn
def test_the_state_is_the_same_size_after_10_and_1000_batches(kind, draw, generator):
    observer = kind()
    sizes = {}
    for batch in range(1000):
        observer.update(draw(generator)[: 1 + batch % 13] * (1 + batch / 100))
        if batch in (9, 999):
            sizes[batch] = state_bytes(observer)
    assert sizes[9] == pytest.approx(sizes[999], abs=64)  # a number more or less to write down


@streaming
@drawn
def test_one_pass_or_two_of_the_same_data_is_nearly_the_same(kind, see, draw, generator):
    values = draw(generator)
    width = (values.max() - values.min()).item()
    once, twice = see(kind(), values).range(), see(kind(), values, values).range()
    assert once == pytest.approx(twice, abs=width / 1000, rel=1e-6)


@every
def test_the_order_of_batches_does_not_matter_where_the_first_spans_all(kind, see, generator):
    values = torch.randn(3000, generator=generator)
    batches = list(values.split(100))
    first = torch.tensor([values.min(), values.max()])
    shuffled = random.Random(0).sample(batches, len(batches))
    if kind is FOUND["moving_average"]:
        kind = lambda: FOUND["moving_average"](momentum=1.0)  # noqa: E731
    assert see(kind(), first, *batches).range() == pytest.approx(see(kind(), first, *shuffled).range(), rel=1e-12)


@every
def test_other_threads_random_numbers_are_not_touched(kind, see, generator):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    see(kind(), torch.randn(1000, generator=generator)).range()
    assert torch.equal(torch.get_rng_state(), state)
