"""Chain and replay, on lines alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.registry import history

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
bodies = st.fixed_dictionaries(
    {
        "action": st.sampled_from(["register", "promote", "rollback"]),
        "name": texts,
        "alias": st.none() | texts,
        "before": st.none() | st.integers(1, 99),
        "after": st.integers(1, 99),
        "actor": texts,
        "reason": texts,
        "details": texts,
    }
)


def chain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    previous, sealed = "", []
    for number, body in enumerate(lines, 1):
        line = {**body, "number": number, "time": (moment + timedelta(seconds=number)).isoformat()}
        line["hash"] = previous = history.line_hash(line, previous)
        sealed.append(line)
    return sealed


@given(lines=st.lists(bodies, min_size=1, max_size=6), data=st.data())
def test_any_change_breaks_the_chain(lines: list[dict[str, Any]], data: st.DataObject) -> None:
    sealed = chain(lines)
    assert history.broken_links(sealed) == []
    index = data.draw(st.integers(0, len(lines) - 1))
    key = data.draw(st.sampled_from(sorted(lines[index])))
    other = data.draw(bodies)[key]
    altered = [dict(line) for line in sealed]
    altered[index][key] = other
    assert bool(history.broken_links(altered)) == (other != sealed[index][key])


@given(lines=st.lists(bodies, min_size=2, max_size=6), data=st.data())
def test_any_removal_but_of_the_tail_breaks_it(lines: list[dict[str, Any]], data: st.DataObject) -> None:
    sealed = chain(lines)
    gone = data.draw(st.integers(0, len(lines) - 2))
    assert history.broken_links(sealed[:gone] + sealed[gone + 1 :])
    assert history.broken_links(sealed[:-1]) == []  # which is why there is a head


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"]), st.none() | st.integers(1, 3)), max_size=30
    )
)
def test_replay_is_a_stack(moves: list[tuple[str, str, int | None]]) -> None:
    stacks: dict[tuple[str, str], list[int]] = {}
    lines = []
    for name, alias, number in moves:
        stack = stacks.setdefault((name, alias), [])
        before = stack[-1] if stack else None
        if number is not None:
            stack.append(number)
            action = "promote"
        elif len(stack) > 1:
            stack.pop()
            action = "rollback"
        else:
            continue
        lines.append(
            {"action": action, "name": name, "alias": alias, "before": before, "after": stack[-1], "number": 1}
        )
        lines.append({"action": "register", "name": name, "alias": None, "before": None, "after": 9, "number": 1})
    found, problems = history.replay(lines)
    assert problems == []
    assert found == {key: stack for key, stack in stacks.items() if stack}


@pytest.mark.parametrize(
    ("action", "before", "after", "message"),
    [
        ("promote", 2, 3, "says it replaced version 2, where 1 was served"),
        ("promote", None, 3, "says it replaced version None"),
        ("rollback", 1, 3, "went back to version 3, which was not the one before"),
        ("rollback", 1, 1, "went back to version 1, which was not the one before"),
    ],
)
def test_contradictions(action: str, before: int | None, after: int, message: str) -> None:
    line = {"name": "digits", "alias": "champion", "number": 1, "action": "promote", "before": None, "after": 1}
    _, problems = history.replay([line, {**line, "number": 2, "action": action, "before": before, "after": after}])
    assert len(problems) == 1
    assert message in problems[0]


@given(
    previous=st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),
    now=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),
    hours=st.integers(-12, 12),
)
def test_next_time(previous: datetime | None, now: datetime, hours: int) -> None:
    zoned = now.replace(tzinfo=timezone(timedelta(hours=hours)))
    before = None if previous is None else previous.replace(tzinfo=UTC)
    text = history.next_time(before, zoned)
    assert len(text) == 32
    assert text.endswith("+00:00")
    if before is not None:
        assert text > before.isoformat(timespec="microseconds")
        assert datetime.fromisoformat(text) >= zoned
    else:
        assert datetime.fromisoformat(text) == zoned


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", None, b"\xff"])
def test_details_that_are_no_object(text: Any) -> None:
    assert history.details_of({"details": text}) == {}
