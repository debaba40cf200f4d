"""The registry as its users see it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fettle.core import codec
from fettle.core.artifact import Artifact, FileEntry
from fettle.core.errors import CorruptArtifact, ForeignArtifact, NotRegistered, RegistryError, UsageError
from fettle.core.home import Home
from fettle.core.names import Reference
from fettle.core.report import Measurement, Report
from fettle.registry import Registry

Make = Callable[..., Artifact]
MakeReport = Callable[[float], Report]


def when(text: str) -> datetime:
    return datetime.fromisoformat(text)


class TestAbsent:
    def test_reads_as_empty(self, registry: Registry) -> None:
        assert registry.names() == []
        assert registry.versions("digits") == []
        assert registry.aliases("digits") == {}
        assert registry.alias_version("digits", "champion") is None
        assert registry.alias_version("digits", "latest") is None
        assert registry.history() == []
        assert registry.served_at("digits", datetime.now(UTC)) is None
        assert registry.verify() == []
        assert registry.gc() == []

    @pytest.mark.parametrize(
        "act",
        [
            lambda r: r.get("digits"),
            lambda r: r.open("digits"),
            lambda r: r.promote("digits", 1),
            lambda r: r.rollback("digits"),
        ],
    )
    def test_refuses_and_creates_nothing(self, registry: Registry, act: Callable[[Registry], Any]) -> None:
        with pytest.raises(NotRegistered, match="no model 'digits'"):
            act(registry)
        registry.gc(dry_run=False)
        registry.verify()
        assert not registry.home.root.exists()


class TestPut:
    def test_first_version_is_champion(self, registry: Registry, make_artifact: Make, make_report: MakeReport) -> None:
        artifact = make_artifact()
        version = registry.put("digits", artifact, reports=[make_report(0.9)], actor="ada", reason="a start")
        assert str(version) == "digits:1"
        assert version.digest == artifact.digest
        assert (version.runtime, version.precision, version.size_bytes) == ("null", "float", artifact.size_bytes)
        assert version.aliases == ("champion",)
        assert version.reports == (make_report(0.9),)
        first, second = registry.history()
        assert (first.action, first.alias, first.before, first.after) == ("register", None, None, 1)
        assert (first.actor, first.reason, first.time) == ("ada", "a start", version.created)
        assert (second.action, second.alias, second.before, second.after) == ("promote", "champion", None, 1)
        assert (second.actor, second.reason) == ("ada", "first version")
        assert registry.verify() == []

    def test_later_versions_wait(self, registry: Registry, make_artifact: Make) -> None:
        made = [registry.put("digits", make_artifact(seed)) for seed in range(3)]
        assert [version.version for version in made] == [1, 2, 3]
        assert registry.aliases("digits") == {"champion": 1}
        assert [change.action for change in registry.history()] == ["register", "promote", "register", "register"]

    def test_names_count_apart(self, registry: Registry, make_artifact: Make) -> None:
        artifact = make_artifact()
        assert [str(registry.put(name, artifact)) for name in ("b", "a")] == ["b:1", "a:1"]
        assert registry.names() == ["a", "b"]

    def test_same_digest_is_the_same_version(
        self, registry: Registry, make_artifact: Make, make_report: MakeReport
    ) -> None:
        registry.put("digits", make_artifact(), reports=[make_report(0.9)])
        registry.put("digits", make_artifact(1))
        lines = len(registry.history())
        again = registry.put("digits", make_artifact(), reports=[make_report(0.9)])
        assert (again.version, again.reports) == (1, (make_report(0.9),))
        assert len(registry.history()) == lines

    def test_new_reports_are_added_and_written_down(
        self, registry: Registry, make_artifact: Make, make_report: MakeReport
    ) -> None:
        registry.put("digits", make_artifact())
        again = registry.put(
            "digits", make_artifact(), reports=[make_report(0.8), make_report(0.7), make_report(0.8)], reason="measured"
        )
        assert again.reports == (make_report(0.8), make_report(0.7))
        third = registry.put("digits", make_artifact(), reports=[make_report(0.7), make_report(0.6)])
        assert third.reports == (make_report(0.8), make_report(0.7), make_report(0.6))
        line = registry.history()[2]
        assert (line.action, line.before, line.after, line.reason) == ("register", 1, 1, "measured")
        assert len(registry.history()) == 4
        assert registry.verify() == []

    def test_blobs_are_shared_and_addressed_by_content(self, registry: Registry, make_artifact: Make) -> None:
        artifacts = [make_artifact(seed) for seed in range(2)]
        for artifact in artifacts:
            registry.put("digits", artifact)
        expected = {entry.sha256 for a in artifacts for entry in a.manifest.files} | {a.digest for a in artifacts}
        found = {path.name: path for path in registry.home.blobs.rglob("*") if path.is_file()}
        assert found.keys() == expected
        assert all(path.parent.name == name[:2] for name, path in found.items())

    def test_lineage(self, registry: Registry, make_artifact: Make) -> None:
        root = make_artifact()
        given_parent = registry.put("digits", make_artifact(1), parent=root.digest)
        told = registry.put("digits", make_artifact(2, provenance={"parent": root.digest}))
        vague = registry.put("digits", make_artifact(3, provenance={"parent": "somewhere"}))
        assert [given_parent.parent, told.parent, vague.parent] == [root.digest, root.digest, None]

    @pytest.mark.parametrize("name", ["", "Digits", "a/b", "../x", "a b", "x'; DROP TABLE versions; --", "é", "a" * 65])
    def test_bad_name(self, registry: Registry, make_artifact: Make, name: str) -> None:
        with pytest.raises(UsageError, match="a model name must be"):
            registry.put(name, make_artifact())
        assert not registry.home.root.exists()

    @pytest.mark.parametrize("parent", ["", "abc", "g" * 64, "A" * 64])
    def test_bad_parent(self, registry: Registry, make_artifact: Make, parent: str) -> None:
        with pytest.raises(UsageError, match="parent must be a digest"):
            registry.put("digits", make_artifact(), parent=parent)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_report_that_json_cannot_hold(self, registry: Registry, make_artifact: Make, value: float) -> None:
        bad = Report(subject="digits", measurements=(Measurement(name="latency.p50", value=value),))
        with pytest.raises(UsageError, match=r"finite Python numbers.*latency\.p50"):
            registry.put("digits", make_artifact(), reports=[bad])
        assert not registry.home.root.exists()

    @pytest.mark.parametrize("field", ["actor", "reason"])
    @pytest.mark.parametrize("text", ["\0", "a\ud800", "x" * 2001])
    def test_bad_note(self, registry: Registry, make_artifact: Make, field: str, text: str) -> None:
        with pytest.raises(UsageError, match=f"{field} must be at most 2000"):
            registry.put("digits", make_artifact(), **{field: text})

    @pytest.mark.parametrize("damage", ["altered", "shorter", "gone", "link"])
    def test_damaged_since_it_was_opened(self, registry: Registry, make_artifact: Make, damage: str) -> None:
        artifact = make_artifact()
        path = artifact.root / "model.bin"
        content = path.read_bytes()
        if damage == "altered":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        elif damage == "shorter":
            path.write_bytes(content[:-1])
        else:
            path.rename(path.with_name("elsewhere"))
            if damage == "link":
                path.symlink_to("elsewhere")
        with pytest.raises(CorruptArtifact, match=r"model\.bin"):
            registry.put("digits", artifact)
        assert registry.names() == []
        assert registry.verify() == []

    def test_digest_that_is_not_the_manifest(self, registry: Registry, make_artifact: Make) -> None:
        artifact = make_artifact()
        forged = Artifact(digest="0" * 64, manifest=artifact.manifest, root=artifact.root)
        with pytest.raises(CorruptArtifact, match="must hash to the digest"):
            registry.put("digits", forged)

    def test_manifest_that_names_itself_or_a_file_twice(self, registry: Registry, make_artifact: Make) -> None:
        artifact = make_artifact()
        entry = artifact.manifest.files[0]
        for name in ("manifest.json", entry.name):
            extra = FileEntry(name=name, sha256=entry.sha256, size_bytes=entry.size_bytes)
            manifest = dataclasses.replace(artifact.manifest, files=(*artifact.manifest.files, extra))
            forged = Artifact(digest=codec.digest(manifest), manifest=manifest, root=artifact.root)
            with pytest.raises(ForeignArtifact, match="each file once"):
                registry.put("digits", forged)

    def test_artifact_folder_may_go_afterwards(self, registry: Registry, make_artifact: Make) -> None:
        artifact = make_artifact()
        content = (artifact.root / "model.bin").read_bytes()
        registry.put("digits", artifact)
        for path in artifact.root.iterdir():
            path.unlink()
        opened = registry.open("digits")
        assert opened.digest == artifact.digest
        assert (opened.root / "model.bin").read_bytes() == content


class TestGet:
    @pytest.fixture(autouse=True)
    def _three(self, registry: Registry, make_artifact: Make) -> None:
        for seed in range(3):
            registry.put("digits", make_artifact(seed))
        registry.promote("digits", 2, alias="challenger")

    @pytest.mark.parametrize(
        ("text", "number"),
        [("digits", 1), ("digits@champion", 1), ("digits@challenger", 2), ("digits@latest", 3), ("digits:3", 3)],
    )
    def test_reference(self, registry: Registry, text: str, number: int) -> None:
        assert registry.get(text).version == number
        assert registry.get(Reference.parse(text)) == registry.get(text)
        assert registry.open(text).digest == registry.get(text).digest

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("digit", "no model 'digit' is registered; did you mean 'digits'"),
            ("digits@champoin", "no alias 'champoin'; did you mean 'champion'"),
            ("digits:4", "versions 1 to 3, got 4"),
            ("digits:999999999", "versions 1 to 3"),
        ],
    )
    def test_unknown(self, registry: Registry, text: str, message: str) -> None:
        with pytest.raises(NotRegistered, match=message):
            registry.get(text)

    @pytest.mark.parametrize("text", ["", "digits:0", "digits:x", "a@b:1", "' OR 1=1 --", "digits@", "../digits"])
    def test_malformed(self, registry: Registry, text: str) -> None:
        with pytest.raises(UsageError):
            registry.get(text)
        with pytest.raises(UsageError):
            registry.get(Reference(text + "\ud800"))

    def test_aliases_show_on_versions(self, registry: Registry) -> None:
        registry.promote("digits", 2, alias="canary")
        assert [version.aliases for version in registry.versions("digits")] == [
            ("champion",),
            ("canary", "challenger"),
            (),
        ]
        assert registry.aliases("digits") == {"canary": 2, "challenger": 2, "champion": 1}
        assert registry.alias_version("digits", "canary") == 2
        assert registry.alias_version("digits", "latest") == 3
        assert registry.alias_version("digits", "nobody") is None

    def test_as_json(self, registry: Registry) -> None:
        text = json.dumps(codec.to_json(registry.get("digits")))
        assert json.loads(text)["aliases"] == ["champion"]


class TestChanges:
    @pytest.fixture(autouse=True)
    def _three(self, registry: Registry, make_artifact: Make) -> None:
        for seed in range(3):
            registry.put("digits", make_artifact(seed))

    def test_history_is_a_stack(self, registry: Registry) -> None:
        for number in (2, 3):
            change = registry.promote("digits", number, actor="ada", reason="better")
            assert (change.before, change.after, change.actor, change.reason) == (number - 1, number, "ada", "better")
        back = [registry.rollback("digits", reason="worse") for _ in range(2)]
        assert [(change.action, change.before, change.after) for change in back] == [
            ("rollback", 3, 2),
            ("rollback", 2, 1),
        ]
        with pytest.raises(RegistryError, match="must have an earlier version to go back to, and 1 is its first"):
            registry.rollback("digits")
        registry.promote("digits", 3)
        assert registry.rollback("digits").after == 1
        assert registry.verify() == []

    def test_promoting_what_serves_writes_nothing(self, registry: Registry) -> None:
        real = registry.promote("digits", 2, actor="ada")
        registry.put("other", registry.open("digits"))
        lines = registry.history()
        change = registry.promote("digits", 2, actor="bob", reason="again")
        assert (change.before, change.after, change.hash) == (2, 2, "")
        assert (change.number, change.time, change.actor) == (real.number, real.time, "ada")
        assert "nothing changed: digits@champion is version 2 since" in change.reason
        assert registry.history() == lines
        assert registry.rollback("digits").after == 1

    def test_aliases_are_independent(self, registry: Registry) -> None:
        registry.promote("digits", 3, alias="canary")
        registry.promote("digits", 2)
        with pytest.raises(RegistryError, match="earlier version"):
            registry.rollback("digits", alias="canary")
        assert registry.rollback("digits").after == 1
        assert registry.aliases("digits") == {"canary": 3, "champion": 1}
        assert [change.after for change in registry.history(alias="canary")] == [3]
        assert [change.after for change in registry.history("digits", alias="champion")] == [1, 2, 1]

    @pytest.mark.parametrize("number", [0, -1, 4, 10**30])
    def test_unknown_version(self, registry: Registry, number: int) -> None:
        with pytest.raises(NotRegistered, match="versions 1 to 3, got"):
            registry.promote("digits", number)

    @pytest.mark.parametrize("number", [None, "2", 2.0, True])
    def test_no_number(self, registry: Registry, number: Any) -> None:
        with pytest.raises(UsageError, match="must be a number"):
            registry.promote("digits", number)

    @pytest.mark.parametrize("alias", ["latest", "", "Champion", "a@b", "x'--"])
    def test_alias_that_cannot_be_moved(self, registry: Registry, alias: str) -> None:
        with pytest.raises(UsageError):
            registry.promote("digits", 2, alias=alias)
        with pytest.raises(UsageError):
            registry.rollback("digits", alias=alias)
        assert registry.aliases("digits") == {"champion": 1}

    def test_rollback_of_unknown_alias(self, registry: Registry) -> None:
        with pytest.raises(NotRegistered, match="no alias 'canary'"):
            registry.rollback("digits", alias="canary")

    def test_actor_is_the_user(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGNAME", "grace")
        assert registry.promote("digits", 2).actor == "grace"

        def nobody() -> str:
            raise OSError("No username set in the environment")

        monkeypatch.setattr("getpass.getuser", nobody)
        assert registry.promote("digits", 3).actor == f"uid {os.getuid()}"

    def test_what_served_then(self, registry: Registry) -> None:
        changes = [registry.history("digits", alias="champion")[0]]
        changes += [registry.promote("digits", 2), registry.promote("digits", 3), registry.rollback("digits")]
        tick = timedelta(microseconds=1)
        for change, served in zip(changes, (1, 2, 3, 2), strict=True):
            found = registry.served_at("digits", when(change.time))
            assert found is not None
            assert found.version == served
            elsewhere = when(change.time).astimezone(timezone(timedelta(hours=-11)))
            assert registry.served_at("digits", elsewhere) == found
        earlier = registry.served_at("digits", when(changes[1].time) - tick)
        assert earlier is not None
        assert earlier.version == 1
        assert registry.served_at("digits", when(changes[0].time) - tick) is None
        now = registry.served_at("digits", datetime.max.replace(tzinfo=UTC))
        assert now is not None
        assert now.version == 2
        assert registry.served_at("digits", datetime.min.replace(tzinfo=UTC)) is None
        assert registry.served_at("digits", datetime.now(UTC), alias="canary") is None

    def test_naive_time(self, registry: Registry) -> None:
        with pytest.raises(UsageError, match="must have a time zone"):
            registry.served_at("digits", datetime(2026, 1, 1))

    def test_times_rise_in_utc(self, registry: Registry) -> None:
        for number in (2, 3, 2, 3):
            registry.promote("digits", number)
        times = [change.time for change in registry.history()]
        assert times == sorted(set(times))
        assert all(len(text) == 32 and text.endswith("+00:00") for text in times)

    @pytest.mark.parametrize("name", ["x' OR '1'='1", "digits\ud800"])
    def test_names_are_never_sql(self, registry: Registry, name: str) -> None:
        for act in (registry.versions, registry.aliases, registry.history):
            with pytest.raises(UsageError):
                act(name)
        with pytest.raises(UsageError):
            registry.alias_version(name, "champion")
        with pytest.raises(UsageError):
            registry.served_at(name, datetime.now(UTC))

    def test_reason_is_never_sql(self, registry: Registry) -> None:
        reason = "'); DELETE FROM history; -- \" % ? :name {} 💥"
        assert registry.promote("digits", 2, reason=reason).reason == reason
        assert registry.history()[-1].reason == reason
        assert registry.verify() == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["champion", "canary"]), st.one_of(st.none(), st.integers(1, 4))), max_size=12
    )
)
def test_any_moves_agree_with_plain_stacks(
    tmp_path_factory: pytest.TempPathFactory, make_artifact: Make, moves: list[tuple[str, int | None]]
) -> None:
    registry = Registry(Home(tmp_path_factory.mktemp("home")))
    for seed in range(4):
        registry.put("digits", make_artifact(seed))
    stacks: dict[str, list[int]] = {"champion": [1], "canary": []}
    for alias, number in moves:
        stack = stacks[alias]
        if number is not None:
            registry.promote("digits", number, alias=alias)
            if stack[-1:] != [number]:
                stack.append(number)
        elif len(stack) > 1:
            registry.rollback("digits", alias=alias)
            stack.pop()
        else:
            with pytest.raises(RegistryError):
                registry.rollback("digits", alias=alias)
        assert registry.aliases("digits") == {name: held[-1] for name, held in stacks.items() if held}
    assert registry.verify() == []
