"""Following a source, step by step and without a server."""

import pytest

from fettle.core.errors import ArtifactError, CorruptArtifact, NotRegistered, RegistryError
from fettle.serve.fit import BatchTimes
from fettle.serve.lanes import Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import reason_of
from fettle.serve.switch import Switch


@pytest.fixture
def make(shelf):
    def build(source=shelf, **options):
        options = {"retry_s": 60.0, "poll_s": 0.01, **options}

        def mount(served, root):
            return Mounted(served.version, served, root, BatchTimes())

        def changed(now, before):
            switch.changes.append((now.served.version, before and before.served.version))

        switch = Switch(source, options=ServeOptions(**options), metrics=Metrics(), mount=mount, on_change=changed)
        switch.changes = []
        return switch

    return build


def counts(switch):
    text = switch._metrics.render().decode()
    return tuple(
        int(float(text.split(f'fettle_switches_total{{result="{r}"}} ')[1].split()[0])) for r in ("ok", "failed")
    )


def test_loads_what_the_source_means(make):
    switch = make()
    assert (switch.active, switch.attempted) == (None, False)
    switch.step()
    assert switch.active.served.version == 1
    assert (switch.problem, switch.attempted, counts(switch)) == (None, True, (1, 0))


def test_does_nothing_where_nothing_changed(make):
    switch = make()
    switch.step()
    before = switch.active
    for _ in range(3):
        switch.step()
    assert switch.active is before
    assert counts(switch) == (1, 0)


def test_swaps_there_and_back(make, shelf):
    switch = make()
    for version in (1, 2, 1, 2):
        shelf.point(version)
        switch.step()
        assert switch.active.served.version == version
    assert counts(switch) == (4, 0)


def test_each_swap_is_told_with_what_was_before(make, shelf):
    switch = make()
    switch.step()
    shelf.point(2)
    switch.step()
    switch.step()
    assert switch.changes == [(1, None), (2, 1)]


def test_a_version_that_the_workers_refuse_changes_nothing(make, shelf):
    switch = make()
    switch.step()
    before = switch.active

    def refuse(served, root):
        raise CorruptArtifact("golden output differs")

    switch._mount = refuse
    shelf.point(2)
    switch.step()
    assert switch.active is before
    assert switch.problem == "version 2 was refused: golden output differs"


def test_a_bad_version_changes_nothing(make, shelf):
    switch = make()
    switch.step()
    before = switch.active
    path = shelf.root / "2" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-5])
    shelf.point(2)
    for _ in range(5):
        switch.step()
    assert switch.active is before
    assert switch.problem.startswith("version 2 was refused: model.onnx must have")
    assert counts(switch) == (1, 1)


def test_a_bad_version_is_forgotten_when_another_is_meant(make, shelf):
    switch = make()
    switch.step()
    shelf.point(9)
    switch.step()
    assert "version 9 was refused" in switch.problem
    shelf.point(1)
    switch.step()
    assert switch.problem is None
    shelf.point(9)
    switch.step()
    assert counts(switch) == (1, 2)


def test_a_bad_version_is_tried_again_after_a_wait(make, shelf, kit):
    shelf.point(3)
    switch = make(retry_s=0.01)
    switch.step()
    assert switch.active is None
    kit.image_artifact(shelf.root / "3")
    kit.until(lambda: switch.step() or switch.active is not None)
    assert switch.active.served.version == 3


def test_a_source_that_fails_is_told_of_once_and_keeps_the_old(make, shelf):
    switch = make()
    switch.step()
    (shelf.root / "current").unlink()
    for _ in range(5):
        switch.step()
    assert switch.active.served.version == 1
    assert switch.problem.startswith("the source cannot be asked")
    assert counts(switch) == (1, 1)
    shelf.point(2)
    switch.step()
    assert switch.active.served.version == 2
    assert switch.problem is None


def test_close_stops_the_thread(make, kit):
    switch = make()
    switch.start()
    kit.until(lambda: switch.active)
    switch.close(10)
    assert not switch._thread.is_alive()


def test_a_load_that_the_end_of_the_server_breaks_off_is_no_failure(shelf, caplog):
    def mount(served, root):
        switch._stop.set()  # as `close` does, before the workers go
        raise ArtifactError("the server is shutting down")

    switch = Switch(shelf, options=ServeOptions(), metrics=Metrics(), mount=mount, on_change=lambda *_: None)
    switch.start()
    switch._thread.join(10)
    assert not switch._thread.is_alive()
    assert (switch.problem, counts(switch), caplog.records) == (None, (0, 0), [])


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (NotRegistered("no alias 'x'"), "no alias 'x'"),
        (CorruptArtifact("see /srv/a/b c"), "see [path] c"),
        (RegistryError("in '/srv/secret/x.db': locked"), "in '[path]': locked"),
        (CorruptArtifact("got and/or"), "got and/or"),
        (ValueError("/etc/passwd"), "it failed with ValueError: see the log"),
        (CorruptArtifact("x" * 900), "x" * 500),
    ],
)
def test_reasons_have_no_paths_and_no_internals(problem, reason):
    assert reason_of(problem) == reason
