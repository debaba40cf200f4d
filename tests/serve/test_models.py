"""Deployments and models with switches that are stepped by hand: who answers, and how models come and go."""

import asyncio
import functools
import threading
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from fettle.core.errors import CorruptArtifact, NotRegistered
from fettle.serve.fit import BatchTimes
from fettle.serve.lanes import Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.models import Deployment, Entry, Models
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal
from fettle.serve.source import FolderSource, RegistryCatalogue
from fettle.serve.switch import Switch
from fettle.serve.traffic import Sticky, Traffic, Variant, declared


def in_a_loop(test):
    """Runs an async test."""

    @functools.wraps(test)
    def run(*args, **fixtures):
        asyncio.run(test(*args, **fixtures))

    return run


class Stage:
    """Builds deployments whose versions are mounted nowhere; `refuse` holds versions that no worker takes."""

    def __init__(self):
        self.metrics = Metrics()
        self.refuse = set()
        self.retired = []
        self.may_mount = threading.Event()
        self.may_mount.set()
        self.waits = {1, 2}  # versions that `may_mount` is asked for

    def switch(self, source):
        options = ServeOptions(poll_s=0.01, retry_s=60.0)
        return Switch(source, options=options, metrics=self.metrics, mount=self.mount)

    def mount(self, served, root):
        assert served.version not in self.waits or self.may_mount.wait(20)
        if served.version in self.refuse:
            raise CorruptArtifact("golden output differs")
        return Mounted(served.version, served, root, BatchTimes())

    def build(self, traffic):
        switches = [self.switch(variant.source) for variant in traffic.variants]
        shadow = self.switch(traffic.shadow) if traffic.shadow is not None else None
        return Deployment(traffic, switches, metrics=self.metrics, shadow=shadow)

    def retire(self, deployment, switch, model):
        self.retired.append((deployment.name, model.served.version))

    @asynccontextmanager
    async def models(self, *sources, catalogue=None, start=True):
        models = Models(declared(sources), build=self.build, retire=self.retire, catalogue=catalogue)
        if start:
            models.start()
        try:
            yield models
        finally:
            models.close()


@pytest.fixture
def stage():
    return Stage()


@pytest.fixture(scope="module")
def folders(shelf_root):
    return [FolderSource("tiny", shelf_root / "1", 1), FolderSource("tiny", shelf_root / "2", 2)]


def split(folders, **options):
    old, new = folders
    return Traffic((Variant(old, 90, "old"), Variant(new, 10, "new")), **options)


def stepped(deployment):
    for switch in deployment.switches:
        switch.step()
    return deployment


def versions(deployment, count, **request):
    return Counter(deployment.choose(**request).served.version for _ in range(count))


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came true")


# Which version answers


def test_without_a_key_requests_are_shared_exactly(stage, folders):
    deployment = stepped(stage.build(split(folders)))
    assert versions(deployment, 1000) == {1: 900, 2: 100}
    text = stage.metrics.render().decode()
    assert 'fettle_assigned_total{model="tiny",variant="old",version="1"} 900.0' in text
    assert 'fettle_assigned_total{model="tiny",variant="new",version="2"} 100.0' in text


def test_requests_with_a_key_stay_with_one_version_and_those_without_are_shared(stage, folders):
    deployment = stepped(stage.build(split(folders, sticky=Sticky("header", "X-User"))))
    seen = [versions(deployment, 3, headers={"x-user": f"user-{number}"}) for number in range(300)]
    assert all(len(one) == 1 for one in seen)
    assert {version for one in seen for version in one} == {1, 2}
    assert versions(deployment, 1000) == {1: 900, 2: 100}


def test_a_variant_that_is_not_ready_yields_to_those_that_are(stage, folders):
    stage.refuse = {2}
    deployment = stepped(stage.build(split(folders, sticky=Sticky("header", "X-User"))))
    assert versions(deployment, 100) == {1: 100}
    assert {version for n in range(100) for version in versions(deployment, 1, headers={"x-user": f"{n}"})} == {1}
    assert deployment.problem == "version 2 was refused: golden output differs"
    assert [one.served.version for one in deployment.active] == [1]


def test_a_version_that_is_asked_for_is_the_one_that_answers(stage, folders):
    deployment = stepped(stage.build(split(folders)))
    assert versions(deployment, 20, version="2") == {2: 20}
    assert "fettle_assigned_total{" not in stage.metrics.render().decode()
    for absent in ("3", "02", "new", "x" * 100):
        with pytest.raises(Refusal, match="tiny answers as 1, 2") as refused:
            deployment.choose(absent)
        assert refused.value.status == 404


def test_where_no_version_is_ready_it_is_503(stage, folders):
    deployment = stage.build(split(folders))
    for version in ("", "1"):
        with pytest.raises(Refusal, match="no version of tiny is ready") as refused:
            deployment.choose(version)
        assert refused.value.status == 503


def test_the_shadow_answers_nobody(stage, folders):
    deployment = stepped(stage.build(Traffic((Variant(folders[0]),), shadow=folders[1])))
    assert deployment.shadow.active.served.version == 2
    assert [one.served.version for one in deployment.active] == [1]
    with pytest.raises(Refusal) as refused:
        deployment.choose("2")
    assert refused.value.status == 404


# Models that come and go


class Books:
    """A catalogue of two models."""

    def __init__(self, root):
        self.root = root

    def names(self):
        return ["cats", "tiny"]

    def source(self, name):
        if name not in self.names():
            raise NotRegistered(f"no model {name!r} in {self.root}")
        return FolderSource(name, self.root / "2", 2)


@in_a_loop
async def test_unload_and_load_of_what_was_declared(stage, folders):
    async with stage.models(split(folders)) as models:
        await until(lambda: len(models.first.active) == 2)
        late = models.first  # of a request whose header came before, and its body after
        await models.unload("tiny")
        with pytest.raises(Refusal, match="tiny is not loaded any more") as refused:
            late.choose()
        assert refused.value.status == 404
        for ask in (lambda: models.first, lambda: models.find("tiny")):
            with pytest.raises(Refusal, match="this server has none loaded") as refused:
                ask()
            assert refused.value.status == 404
        assert sorted(stage.retired) == [("tiny", 1), ("tiny", 2)]
        with pytest.raises(Refusal):
            await models.unload("tiny")
        await models.load("tiny")
        assert [one.label for one in models.first.variants] == ["old", "new"]
        assert [one.served.version for one in models.first.active] == [1, 2]


@in_a_loop
async def test_load_from_the_catalogue(stage, folders, shelf_root):
    async with stage.models(folders[0], catalogue=Books(shelf_root)) as models:
        await until(lambda: models.first.active)
        assert await models.index() == [Entry("cats", "", "UNAVAILABLE", "not loaded"), Entry("tiny", "1", "READY")]
        await models.load("cats")
        assert models.find("cats").choose().served.version == 2
        assert await models.index() == [Entry("cats", "2", "READY"), Entry("tiny", "1", "READY")]
        assert models.first.name == "tiny"


@in_a_loop
async def test_what_cannot_be_loaded_is_refused_with_the_reason(stage, folders, shelf_root):
    stage.refuse = {2}
    async with stage.models(folders[0], catalogue=Books(shelf_root)) as models:
        with pytest.raises(Refusal, match="cats cannot be loaded: version 2 was refused: golden output") as refused:
            await models.load("cats")
        assert refused.value.status == 400
        with pytest.raises(Refusal, match="unknown model 'dogs'") as refused:
            await models.load("dogs")
        assert refused.value.status == 404
        assert str(shelf_root) not in refused.value.message
        with pytest.raises(Refusal, match="unknown model 'cats'"):
            models.find("cats")
        assert stage.retired == []


@in_a_loop
async def test_without_a_catalogue_only_what_was_declared_is_known(stage, folders):
    async with stage.models(folders[0]) as models:
        with pytest.raises(Refusal, match="this server knows tiny") as refused:
            await models.load("cats")
        assert refused.value.status == 404


@in_a_loop
async def test_load_of_a_loaded_model_follows_its_reference_at_once(stage, shelf):
    async with stage.models(shelf, start=False) as models:
        await models.load("tiny")
        before = models.first.choose()
        await models.load("tiny")
        assert models.first.choose() is before
        shelf.point(2)
        await models.load("tiny")
        assert models.first.choose().served.version == 2
        stage.refuse = {1}
        shelf.point(1)
        for _ in range(2):  # without the wait that following observes
            with pytest.raises(Refusal, match="version 1 was refused") as refused:
                await models.load("tiny")
            assert refused.value.status == 400
        assert models.first.choose().served.version == 2
        entries = await models.index()
        assert [(one.version, one.state) for one in entries] == [("1", "UNAVAILABLE"), ("2", "READY")]
        stage.refuse = set()
        await models.load("tiny")
        assert models.first.choose().served.version == 1
        for switch in models.first.switches:
            switch.start()  # as the server would have: close joins it


@in_a_loop
async def test_what_is_unloaded_while_it_loads_is_forgotten(stage, folders):
    stage.may_mount.clear()
    async with stage.models(folders[0]) as models:
        assert await models.index() == [Entry("tiny", "", "LOADING")]
        unloading = asyncio.ensure_future(models.unload("tiny"))
        await until(lambda: not list(models))
        stage.may_mount.set()
        await asyncio.wait_for(unloading, 20)
        assert stage.retired in ([("tiny", 1)], [])
        assert await models.index() == [Entry("tiny", "", "UNAVAILABLE", "not loaded")]


@in_a_loop
async def test_a_shadow_that_takes_for_ever_to_load_holds_no_unload_up(stage, folders):
    stage.waits = {2}
    stage.may_mount.clear()
    async with stage.models(Traffic((Variant(folders[0]),), shadow=folders[1])) as models:
        await until(lambda: models.first.active)
        await asyncio.wait_for(models.unload("tiny"), 10)
        assert stage.retired == [("tiny", 1)]
        stage.may_mount.set()
        await until(lambda: stage.retired == [("tiny", 1), ("tiny", 2)])


def test_a_registry_is_a_catalogue(tmp_path, kit):
    from fettle.core.home import Home
    from fettle.registry.store import Registry

    registry = Registry(Home(tmp_path / "home"))
    registry.put("tiny", kit.image_artifact(tmp_path / "1"))
    registry.put("tiny", kit.image_artifact(tmp_path / "2", bias=(1.0, 0.0, 0.0)))
    registry.promote("tiny", 1)
    catalogue = RegistryCatalogue(registry)
    assert catalogue.names() == ["tiny"]
    assert catalogue.source("tiny").current() == 1
    with pytest.raises(NotRegistered):
        catalogue.source("cats")
