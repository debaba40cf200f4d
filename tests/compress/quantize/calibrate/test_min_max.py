from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate.min_max import MinMax

BATCHES = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), min_size=1, max_size=12
)


@settings(max_examples=50, deadline=None)
@given(batches=BATCHES, levels=st.integers(2, 65536))
def test_it_is_the_smallest_and_largest(see, batches, levels):
    flat = [value for batch in batches for value in batch]
    assert see(MinMax(levels), *batches).range() == (min(0.0, *flat, 0.0), max(0.0, *flat, 0.0))
