"""Try recipes in every runtime: a failed candidate is named and does not stop the run."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from fettle.compress.quantize.give_back import GiveBack
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.post_training import PostTraining
from fettle.core import plugins
from fettle.core.errors import UsageError
from fettle.core.recipe import Recipe
from fettle.core.report import Report
from fettle.core.runner import Runner, RuntimeBase
from fettle.evaluate.comparison import Candidate
from fettle.evaluate.footprint import size_on_disk
from fettle.evaluate.latency import Latency, measure_latency
from fettle.evaluate.layers import LayerLine
from fettle.stages.build import Built, Prepared, build, deploy, first_rows, prepare, with_activation
from fettle.stages.corrections import Corrected, find_corrections
from fettle.stages.fit import fit
from fettle.stages.give_back import Wanted, corrections_of, give_back, layers_in_float, with_layers_in_float
from fettle.stages.judge import Judge, helps
from fettle.stages.measure import first_line, is_classification
from fettle.stages.recipes import light_recipes
from fettle.stages.sensitivity import account_for_layers, lighten
from fettle.stages.spend import Allowance, Price, repeat, spend, work_of
from fettle.stages.steps import carry_out, load_step, precision_of, simulated_metric
from fettle.stages.task import Task

BASELINE = "float in eager"
_WITH_SLACK = "int8 with float layers"
# Of a time limit, what the search for corrections, for layers to give back, and for nearer answers may take.
_CORRECTIONS, _GIVING_BACK, _SPENDING = 0.3, 0.3, 0.15
# Without a time limit; a network of a hundred layers would be searched for long.
_SPENDING_S = 180.0
_QUICK_TIMING_S = 1.0


@dataclass(slots=True)
class Tried:
    """What came of all candidates: those built, by label, and those that failed, with the reason.

    notes: what the steps had to say; decisions: which corrections were kept; layers: where int8 loses what.
    """

    built: dict[str, Built] = field(default_factory=dict)
    failed: list[Candidate] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    layers: tuple[LayerLine, ...] = ()

    def fail(self, label: str, precision: str, runtime: str, reason: str) -> None:
        """Note a candidate that could not be had."""
        empty = Report(subject="")
        self.failed.append(
            Candidate(
                label=label, digest="", runtime=runtime, precision=precision, steps=(), report=empty, failure=reason
            )
        )


def try_all(task: Task, root: Path, *, runtimes: Sequence[str] = (), recipes: Sequence[Recipe] = ()) -> Tried:
    """Build the baseline first (its failure is raised), then every other recipe in every installed runtime.

    runtimes: names to use besides eager; empty for all that are installed and compute. recipes: what to try on the
    model; empty for what fettle thinks of. Compressed candidates come before float ones: where time runs out, they
    are what the user came for.
    """
    untouched = Recipe(name="float", budget=task.budget, seed=task.seed)
    trials = _Trials(task, root, tuple(runtimes), asked=bool(recipes))
    trials.begin(untouched)
    if recipes:
        for recipe in recipes:
            trials.try_recipe(recipe)
    else:
        trials.try_int8()
        for recipe in light_recipes(task):
            trials.try_recipe(recipe)
    trials.try_recipe(untouched)
    return trials.tried


@dataclass(slots=True)
class _Trials:
    """One run: what was tried so far, and what is needed to try more. asked: the recipes are the user's own."""

    task: Task
    root: Path
    runtimes: tuple[str, ...]
    asked: bool
    tried: Tried = field(default_factory=Tried)
    start: float = field(default_factory=lambda: time.monotonic())
    share: float = 0.0
    baseline: Built | None = None
    prepared: dict[str, Prepared] = field(default_factory=dict)

    def begin(self, untouched: Recipe) -> None:
        """Build the original in eager, twice: its first answers tell what the signature must say of them."""
        task = self.task
        task.progress(BASELINE, 0.0)
        original = self.prepared[untouched.digest] = prepare(task, untouched)
        first = build(task, original, "eager", root=self.root / "float-eager", parent="", signature=task.signature)
        classification = is_classification(task.metric.name, task.signature.classes)
        signature = with_activation(task.signature, first.outputs, classification=classification)
        self.baseline = build(task, original, "eager", root=self.root / "float-eager", parent="", signature=signature)
        self.tried.built[BASELINE] = self.baseline
        self.share = 0.1

    def try_int8(self) -> None:
        """Integers with the corrections that help; and with layers in float, where no engine keeps the floor."""
        recipe = Recipe(name="int8", steps=(PostTraining().spec(),), budget=self.task.budget, seed=self.task.seed)
        engines = self._engines(recipe)
        if not engines or self._is_over():
            self.try_recipe(recipe)  # names each engine as not tried
            return
        base = load_step(fit(recipe, [_runtime(engine) for engine in engines], note=self._say).steps[0])
        assert isinstance(base, PostTraining)
        try:
            corrected = find_corrections(
                self.task, base, limit_s=self._part(_CORRECTIONS), progress=self._within("int8", 0.25)
            )
            self._account(corrected.model)
        except Exception as problem:
            for engine in engines:
                self.tried.fail(f"int8 in {engine}", "int8", engine, first_line(problem))
            return
        for note in corrected.notes:
            self._say(note)
        self.tried.decisions = corrected.decisions
        self.prepared[corrected.recipe.digest] = Prepared.of(
            self.task, corrected.recipe, corrected.model, notes=corrected.notes
        )
        labels = self.try_recipe(corrected.recipe)
        built = [self.tried.built[label] for label in labels if label in self.tried.built]
        wanting = self._wanting(built)
        if wanting is not None and self.tried.layers:
            self._give_back(corrected, wanting)
        self._spend(corrected)

    def _wanting(self, built: Sequence[Built]) -> Built | None:
        """The fastest that misses the floor, where none that keeps it is as fast: layers in float may mend it."""
        built = [entry for entry in built if _runtime(entry.artifact.manifest.runtime).computes]
        missing = [entry for entry in built if entry.metric.value < self._floor()]
        if not missing:
            return None
        times_ms = self._time({entry.artifact.manifest.runtime: entry.runner for entry in built})
        kept_ms = [times_ms[entry.artifact.manifest.runtime] for entry in built if entry not in missing]
        fastest = min(missing, key=lambda entry: times_ms[entry.artifact.manifest.runtime])
        return fastest if times_ms[fastest.artifact.manifest.runtime] < min(kept_ms, default=math.inf) else None

    def _floor(self) -> float:
        assert self.baseline is not None
        return self.task.budget.floor(self.baseline.metric.value)

    def _give_back(self, corrected: Corrected, int8: Built) -> None:
        engine = int8.artifact.manifest.runtime

        def cost_ms(recipe: Recipe) -> float:
            label = "int8 and float, for its time"
            folder = self.root / f"{recipe.digest[:8]}-{engine}"
            entry = self._build(recipe, engine, folder)
            both = self._time({"int8": int8.runner, label: entry.runner})
            return both[label] - both["int8"]

        try:
            # An engine may answer worse than the simulation that the layers are chosen by: it must make up for that.
            gap = max(0.0, simulated_metric(self.task, corrected.model) - int8.metric.value)
            assert self.baseline is not None
            wanted = Wanted(
                floor=min(self._floor() + gap, max(self._floor(), self.baseline.metric.value)),
                latency_ms=self._time({"int8": int8.runner})["int8"],
                cost_ms=cost_ms,
                limit_s=self._part(_GIVING_BACK),
            )
            given = give_back(
                self.task,
                corrected,
                self.tried.layers,
                Judge(self.task),
                wanted,
                progress=self._within("int8 and float", 0.2),
            )
        except Exception as problem:
            self.tried.fail(f"int8 and float in {engine}", "int8", engine, first_line(problem))
            return
        if given is not None:
            self.tried.layers = given.lines
            self.try_recipe(given.recipe)

    def _spend(self, corrected: Corrected) -> None:
        """Layers of the fastest int8 that keeps the floor go back to float, where the slack pays for nearer answers."""
        budget = self.task.budget
        int8 = self._fastest_int8()
        if int8 is None or budget.slack == 0 or "latency" not in budget.minimize or self._is_over():
            return
        engine = int8.artifact.manifest.runtime
        try:
            self._bring_nearer(corrected, int8, engine)
        except Exception as problem:
            self.tried.fail(f"{_WITH_SLACK} in {engine}", "int8", engine, first_line(problem))

    def _bring_nearer(self, corrected: Corrected, int8: Built, engine: str) -> None:
        """Find the layers, correct what is left in int8 anew, and build that where its answers really are nearer."""
        recipe = int8.artifact.manifest.recipe
        found = self.prepared[recipe.digest].model
        assert isinstance(found, Simulated)
        judge = Judge(self.task)
        already = layers_in_float(recipe)
        lines = [line for line in self.tried.layers if line.layer not in already]
        report, limit_s, start = self._within(_WITH_SLACK, 0.2), self._part(_SPENDING), time.monotonic()

        def proceed(share: float) -> bool:
            report(share)
            return time.monotonic() - start < (_SPENDING_S if limit_s is None else limit_s)

        allowance = Allowance(
            slack=self.task.budget.slack,
            price=partial(self._price, recipe, int8),
            latency_ms=self._time({"int8": int8.runner})["int8"],
            proceed=proceed,
        )
        spent = spend(lighten(self.task, found), judge, lines, work_of(found), allowance)
        self.tried.decisions += spent.decisions
        if not spent.layers:
            return
        # The corrections see what is deployed; what they make of it must be nearer than what they made of int8.
        again = replace(with_layers_in_float(corrected.recipe, (*already, *spent.layers)), name=_WITH_SLACK)
        again = fit(again, [_runtime(engine)], note=self._say)
        notes: list[str] = []
        steps = (GiveBack(layers=spent.layers), *corrections_of(corrected.recipe))
        model = carry_out(self.task, steps, found.uncorrected(), seed=self.task.seed, note=notes.append)
        if not helps(judge.divergence(found), judge.divergence(model)):
            self.tried.decisions += ("layers in float: left out, once corrected the answers are no nearer to float",)
            return
        kept = self.prepared[recipe.digest].notes
        self.prepared[again.digest] = Prepared.of(self.task, again, model, notes=(*kept, *notes))
        (label,) = self.try_recipe(again, engines=(engine,))
        if label in self.tried.built:
            by_name = {line.layer: line for line in spent.lines}
            self.tried.layers = tuple(by_name.get(line.layer, line) for line in self.tried.layers)

    def _fastest_int8(self) -> Built | None:
        """Of the static int8 candidates that compute, the fastest that keeps the floor."""
        entries = {
            label: entry
            for label, entry in self.tried.built.items()
            if isinstance(self._model_of(entry), Simulated)
            and _runtime(entry.artifact.manifest.runtime).computes
            and entry.metric.value >= self._floor()
        }
        times_ms = self._time({label: entry.runner for label, entry in entries.items()}) if entries else {}
        return entries[min(times_ms, key=lambda label: times_ms[label])] if times_ms else None

    def _model_of(self, entry: Built) -> torch.nn.Module | None:
        found = self.prepared.get(entry.artifact.manifest.recipe.digest)
        return found.model if found else None

    def _price(self, recipe: Recipe, int8: Built, model: torch.nn.Module) -> Price:
        """What the model costs beside int8, in its engine; how corrections round the weights changes no time."""
        task, signature = self.task, int8.artifact.manifest.signature
        prepared = Prepared.of(task, recipe, model, notes=())
        with tempfile.TemporaryDirectory() as folder:
            artifact, runner = deploy(
                task, prepared, int8.artifact.manifest.runtime, root=Path(folder) / "model", signature=signature
            )
            growth = size_on_disk(artifact.root) / int8.artifact.size_bytes if "size" in task.budget.minimize else 1.0

            def ratio() -> float:
                times_ms = self._time({"int8": int8.runner, "lighter": runner})
                return times_ms["lighter"] / times_ms["int8"]

            return repeat(ratio, slack=task.budget.slack, growth=growth)

    def try_recipe(self, recipe: Recipe, *, engines: Sequence[str] = ()) -> list[str]:
        """Build it in every engine that executes its precision, or in these; return the labels, of what failed too."""
        labels = []
        for engine in engines or self._engines(recipe):
            label = f"{recipe.name} in {engine}"
            labels.append(label)
            if self._is_over():
                limit = self.task.budget.time_limit
                self.tried.fail(label, _precision(recipe), engine, f"not tried: the time limit of {limit} was reached")
                continue
            self.task.progress(label, self.share)
            try:
                folder = self.root / f"{recipe.name}-{engine}".replace(" ", "-")
                self.tried.built[label] = self._build(recipe, engine, folder)
            except Exception as problem:
                if self.asked and isinstance(problem, UsageError):
                    raise  # the user's recipe is wrong, not the engine
                self.tried.fail(label, _precision(recipe), engine, first_line(problem))
            self.share = min(0.85, self.share + 0.04)
        return labels

    def _build(self, recipe: Recipe, engine: str, folder: Path) -> Built:
        assert self.baseline is not None
        recipe = fit(recipe, [_runtime(engine)], note=self._say)
        if recipe.digest not in self.prepared:
            said = partial(self.task.progress, f"{recipe.name} in {engine}")
            self.prepared[recipe.digest] = prepare(self.task, recipe, progress=lambda _: said(self.share))
            self._account(self.prepared[recipe.digest].model)
            for note in self.prepared[recipe.digest].notes:
                self._say(note)
        return build(
            self.task,
            self.prepared[recipe.digest],
            engine,
            root=folder,
            parent=self.baseline.artifact.digest,
            signature=self.baseline.artifact.manifest.signature,
        )

    def _say(self, note: str) -> None:
        """What the reader of the report should know, once."""
        if note not in self.tried.notes:
            self.tried.notes += (note,)

    def _account(self, model: torch.nn.Module) -> None:
        """The lines of the layers, from the first model in integers."""
        if isinstance(model, Simulated) and not self.tried.layers:
            self.tried.layers = account_for_layers(self.task, model)

    def _time(self, runners: Mapping[str, Runner]) -> dict[str, float]:
        """Medians in milliseconds, interleaved."""
        rows = first_rows(self.task, self.task.batch)
        arrays = [rows[spec.name] for spec in self.task.signature.inputs]
        calls: dict[str, Callable[[], object]] = {label: partial(runner, *arrays) for label, runner in runners.items()}
        timed = measure_latency(
            calls,
            batch=self.task.batch,
            threads=self.task.threads,
            time_limit_s=_QUICK_TIMING_S * len(calls),
            seed=self.task.seed,
        )
        return {label: found.p50_ms for label, found in timed.items() if isinstance(found, Latency)}

    def _engines(self, recipe: Recipe) -> list[str]:
        """Installed runtimes that really execute the recipe's precision; eager float is the baseline already."""
        installed = plugins.installed("fettle.runtime", RuntimeBase)
        names = list(self.runtimes) or [
            name for name, runtime in installed.items() if runtime.computes and runtime.by_default
        ]
        precision = _precision(recipe)
        return [
            name for name in names if precision in _runtime(name).precisions and (name, precision) != ("eager", "float")
        ]

    def _is_over(self) -> bool:
        limit_s = self.task.budget.time_limit_s
        return limit_s is not None and time.monotonic() - self.start > limit_s

    def _part(self, share: float) -> float | None:
        """This share of the time limit, and no more than what is left; None without a limit."""
        limit_s = self.task.budget.time_limit_s
        if limit_s is None:
            return None
        return max(0.0, min(share * limit_s, limit_s - (time.monotonic() - self.start)))

    def _within(self, label: str, width: float) -> Callable[[float], None]:
        """Progress inside a part of the run that is `width` of the whole."""
        first = self.share

        def report(share: float) -> None:
            self.share = max(self.share, first + width * min(share, 1.0))
            self.task.progress(label, self.share)

        return report


def _runtime(name: str) -> type[RuntimeBase]:
    return plugins.load("fettle.runtime", name, RuntimeBase)


def _precision(recipe: Recipe) -> str:
    return precision_of([load_step(spec) for spec in recipe.steps])
