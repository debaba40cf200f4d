"""One batch, from the bytes of its requests to the bytes of their answers. Runs in a worker process.

Each item fails alone: what cannot be read is refused before the batch runs, and where the engine fails on a batch its
items run one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fettle.core.signature import Array
from fettle.core.statistics import input_statistics
from fettle.serve import protocol
from fettle.serve.answer import Answer
from fettle.serve.binary import format_binary, parse_binary
from fettle.serve.images import decode_base64, preprocess_into
from fettle.serve.logs import about
from fettle.serve.model import LoadedModel, ModelFault, run
from fettle.serve.prediction import format_prediction, image_spec
from fettle.serve.protocol import InferCall
from fettle.serve.refusal import Refusal
from fettle.serve.wire import MAX_ANSWER_BYTES, Item, Outcome, Work

_log = logging.getLogger("fettle.serve")

# The bytes of an answer, and how many of them are the JSON part where tensors follow it; 0 where none do.
Content = tuple[bytes, int]


@dataclass(slots=True)
class Batch:
    """What came of a batch. results: by item, an answer's bytes with what is to be logged of it, or a refusal.

    seconds, rows: of the engine.
    """

    results: list[tuple[Content, Answer] | Refusal | None]
    seconds: float = 0.0
    rows: int = 0

    def packed(self) -> tuple[list[Outcome], list[bytes]]:
        """As the wire wants it."""
        outcomes: list[Outcome] = []
        parts: list[bytes] = []
        left = MAX_ANSWER_BYTES
        for result in self.results:
            outcome, own = _packed(result)
            size = sum(map(len, own))
            if size > left:
                outcome, own = _packed(Refusal(413, f"the answer would have {size} bytes: send fewer rows at once"))
            left -= sum(map(len, own))
            outcomes.append(outcome)
            parts += own
        return outcomes, parts


def _packed(result: tuple[Content, Answer] | Refusal | None) -> tuple[Outcome, list[bytes]]:
    if isinstance(result, Refusal):
        text = result.message.encode("utf-8", "replace")
        return Outcome(status=result.status, size=len(text)), [text]
    assert result is not None, "an item without an outcome would hang"
    (content, header_bytes), answer = result
    probabilities, statistics = answer.probabilities, answer.statistics
    if probabilities is None or statistics is None:
        return Outcome(200, len(content), header_bytes), [content]
    rows, classes = probabilities.shape
    observed = [np.ascontiguousarray(array, np.float32).tobytes() for array in (probabilities, statistics)]
    return Outcome(200, len(content), header_bytes, rows, classes), [content, *observed]


@dataclass(slots=True, kw_only=True)
class _Ready:
    """An item whose inputs are read. finish: makes its answer's bytes."""

    index: int
    inputs: Mapping[str, Array]
    rows: int
    finish: Callable[[Answer], Content]


@dataclass(slots=True)
class _Engine:
    model: LoadedModel
    max_batch_rows: int
    observe: bool
    batch: Batch = field(default_factory=lambda: Batch([]))

    def answer(self, group: Sequence[_Ready], inputs: Mapping[str, Array], items: Sequence[Item]) -> None:
        """Fill in the results of items that run together. inputs: theirs, one below the other."""
        try:
            answers = self._infer(group, inputs)
        except BaseException as problem:  # a panic in a library written in Rust is no Exception
            if len(group) == 1:
                self.batch.results[group[0].index] = self._refusal(problem, items[group[0].index])
                return
            for one in group:  # one bad item must not fail its neighbors: each gets its own chance
                self.answer([one], one.inputs, items)
            return
        for one, answer in zip(group, answers, strict=True):
            try:
                self.batch.results[one.index] = (one.finish(answer), answer)
            except Exception as problem:
                self.batch.results[one.index] = self._refusal(problem, items[one.index])

    def _infer(self, group: Sequence[_Ready], inputs: Mapping[str, Array]) -> list[Answer]:
        model = self.model
        started = time.perf_counter()
        outputs = run(model, inputs, max_batch_rows=self.max_batch_rows)
        self.batch.seconds += time.perf_counter() - started
        self.batch.rows += sum(one.rows for one in group)
        probabilities = statistics = None
        if model.classifies:
            with np.errstate(invalid="ignore"):
                probabilities = model.signature.probabilities(outputs[model.signature.outputs[0].name])
                if self.observe and model.row_wise:  # else the rows of the input are not those of the output
                    statistics = input_statistics(inputs[model.signature.inputs[0].name])
        if len(group) == 1:
            return [Answer(outputs=outputs, probabilities=probabilities, statistics=statistics)]
        answers, start = [], 0
        for one in group:
            part = slice(start, start + one.rows)
            start += one.rows
            answers.append(
                Answer(
                    outputs={name: array[part] for name, array in outputs.items()},
                    probabilities=None if probabilities is None else probabilities[part],
                    statistics=None if statistics is None else statistics[part],
                )
            )
        return answers

    def _refusal(self, problem: BaseException, item: Item) -> Refusal:
        if isinstance(problem, Refusal):
            return problem
        name, version = self.model.name, self.model.version
        fields = about(request_id=item.request_id, trace_id=item.trace_id, model=name, version=version)
        if isinstance(problem, ModelFault):
            _log.error("request %s: %s", item.request_id, problem, extra=fields)
            return Refusal(500, str(problem))
        _log.error("request %s failed in %s:%d", item.request_id, name, version, exc_info=problem, extra=fields)
        return Refusal(500, "the model failed on this input")


def execute(work: Work, payloads: Sequence[memoryview], model: LoadedModel, *, max_batch_rows: int) -> Batch:
    """Answer every item of the batch."""
    engine = _Engine(model, max_batch_rows, work.observe, Batch([None] * len(payloads)))
    if work.kind == "image":
        _images(engine, work, payloads)
    else:
        _tensors(engine, work, payloads)
    return engine.batch


def _images(engine: _Engine, work: Work, payloads: Sequence[memoryview]) -> None:
    """All images together, decoded into the rows of one array."""
    model = engine.model
    spec = image_spec(model)
    name = model.signature.inputs[0].name
    rows = model.runner.empty(name, (len(payloads), *spec.shape))
    group: list[_Ready] = []
    for index, (item, payload) in enumerate(zip(work.items, payloads, strict=True)):
        try:
            content = decode_base64(payload) if item.encoded else payload
            row = rows[len(group) : len(group) + 1]
            preprocess_into(content, spec, row[0], max_pixels=work.max_image_pixels)
        except Exception as problem:
            engine.batch.results[index] = engine._refusal(problem, item)
            continue
        group.append(_Ready(index=index, inputs={name: row}, rows=1, finish=_prediction(model, item.request_id)))
    if group:
        engine.answer(group, {name: rows[: len(group)]}, work.items)


def _prediction(model: LoadedModel, request_id: str) -> Callable[[Answer], Content]:
    return lambda answer: (msgspec.json.encode(format_prediction(answer, model=model, request_id=request_id)), 0)


def _tensors(engine: _Engine, work: Work, payloads: Sequence[memoryview]) -> None:
    """Requests of one shape together, as many as the batch may have."""
    model = engine.model
    groups: dict[object, list[_Ready]] = {}
    for index, (item, payload) in enumerate(zip(work.items, payloads, strict=True)):
        try:
            call = _call(work, item, payload, model)
        except Exception as problem:
            engine.batch.results[index] = engine._refusal(problem, item)
            continue
        ready = _Ready(index=index, inputs=call.inputs, rows=call.rows, finish=_formatted(work, model, call))
        # Requests for a model of a fixed size share nothing.
        groups.setdefault(call.shape if model.row_wise else index, []).append(ready)
    for group in groups.values():
        engine.answer(group, merge([one.inputs for one in group], model.runner.empty), work.items)


def _call(work: Work, item: Item, payload: memoryview, model: LoadedModel) -> InferCall:
    if work.kind == "grpc":
        from fettle.serve.rpc.tensors import parse_grpc  # protobuf, which is an extra

        call = parse_grpc(payload, model.signature)
    elif work.kind == "binary":
        call = parse_binary(payload, header_bytes=item.header_bytes, signature=model.signature)
    else:
        call = protocol.parse_infer(payload, model.signature)
    if call.rows > work.max_rows:
        raise Refusal(413, f"a request may have at most {work.max_rows} rows, got {call.rows}")
    return call


def _formatted(work: Work, model: LoadedModel, call: InferCall) -> Callable[[Answer], Content]:
    if work.kind == "grpc":
        from fettle.serve.rpc.tensors import format_grpc

        return lambda answer: (format_grpc(answer, model=model, call=call), 0)
    if call.binary:
        return lambda answer: format_binary(answer, model=model, call=call)
    return lambda answer: (protocol.format_infer(answer, model=model, call=call), 0)


def merge(inputs: Sequence[Mapping[str, Array]], empty: Callable[[str, tuple[int, ...]], Array]) -> Mapping[str, Array]:
    """The rows of all, one below the other. empty: makes the array for the input of a name.

    >>> merge([{"x": np.zeros((1, 2))}, {"x": np.ones((2, 2))}], lambda name, shape: np.empty(shape))["x"].shape
    (3, 2)
    """
    if len(inputs) == 1:
        return inputs[0]
    merged = {}
    for name, first in inputs[0].items():
        parts = [arrays[name] for arrays in inputs]
        merged[name] = np.concatenate(parts, out=empty(name, (sum(map(len, parts)), *first.shape[1:])))
    return merged
