"""One batch, from the bytes of its requests to the bytes of their answers. Runs in a worker process.

Each item fails alone: what cannot be read is refused before the batch runs, and where the engine fails on a batch its
items run one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fettle.core.signature import Array
from fettle.core.statistics import input_statistics
from fettle.serve import protocol
from fettle.serve.answer import Answer
from fettle.serve.binary import format_binary, parse_binary
from fettle.serve.images import decode_base64, preprocess_into
from fettle.serve.logs import about
from fettle.serve.model import LoadedModel, ModelFault, run
from fettle.serve.prediction import format_predictions, image_spec
from fettle.serve.protocol import InferCall
from fettle.serve.refusal import Refusal
from fettle.serve.wire import MAX_ANSWER_BYTES, Item, Outcome, Work

_log = logging.getLogger("fettle.serve")

# The bytes of an answer, and how many of them are the JSON part where tensors follow it; 0 where none do.
Content = tuple[bytes, int]

_UNOBSERVED = Answer(outputs={})


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


@dataclass(slots=True)
class _Ready:
    """An item whose inputs are read, so many rows. finish: makes a tensor answer's bytes; images are made together."""

    index: int
    rows: int
    finish: Callable[[Answer], Content] | None = None


@dataclass(slots=True)
class _Engine:
    model: LoadedModel
    work: Work
    max_batch_rows: int
    batch: Batch

    def answer(self, group: Sequence[_Ready], inputs: Mapping[str, Array]) -> None:
        """Fill in the results of items that run together. inputs: theirs, one below the other."""
        try:
            whole = self._infer(group, inputs)
        except BaseException as problem:  # a panic in a library written in Rust is no Exception
            if len(group) == 1:
                self.refuse(group[0].index, problem)
                return
            start = 0
            for one in group:  # one bad item must not fail its neighbors: each gets its own chance
                self.answer([one], {name: array[start : start + one.rows] for name, array in inputs.items()})
                start += one.rows
            return
        if self.work.kind == "image":
            self._finish_images(group, whole)
        else:
            self._finish_tensors(group, whole)

    def _infer(self, group: Sequence[_Ready], inputs: Mapping[str, Array]) -> Answer:
        model = self.model
        started = time.perf_counter()
        outputs = run(model, inputs, max_batch_rows=self.max_batch_rows)
        self.batch.seconds += time.perf_counter() - started
        self.batch.rows += sum(one.rows for one in group)
        probabilities = statistics = None
        if model.classifies:
            with np.errstate(invalid="ignore"):
                probabilities = model.signature.probabilities(outputs[model.signature.outputs[0].name])
                if self.work.observe and model.row_wise:  # else the rows of the input are not those of the output
                    statistics = input_statistics(inputs[model.signature.inputs[0].name])
        return Answer(outputs=outputs, probabilities=probabilities, statistics=statistics)

    def _finish_images(self, group: Sequence[_Ready], whole: Answer) -> None:
        ids = [self.work.items[one.index].request_id for one in group]
        contents = format_predictions(whole, model=self.model, request_ids=ids)
        for row, (one, content) in enumerate(zip(group, contents, strict=True)):
            if isinstance(content, ModelFault):
                self.refuse(one.index, content)
            else:
                own = _UNOBSERVED if whole.statistics is None else whole.part(row, row + 1)
                self.batch.results[one.index] = (content, 0), own

    def _finish_tensors(self, group: Sequence[_Ready], whole: Answer) -> None:
        start = 0
        for one in group:
            answer = whole if len(group) == 1 else whole.part(start, start + one.rows)
            start += one.rows
            assert one.finish is not None
            try:
                self.batch.results[one.index] = one.finish(answer), answer
            except Exception as problem:
                self.refuse(one.index, problem)

    def refuse(self, index: int, problem: BaseException) -> None:
        """The item's result is a refusal; what is nobody's fault but ours or the model's is logged too."""
        self.batch.results[index] = self._refusal(problem, self.work.items[index])

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
    engine = _Engine(model, work, max_batch_rows, Batch([None] * len(payloads)))
    if work.kind == "image":
        _images(engine, payloads)
    else:
        _tensors(engine, payloads)
    return engine.batch


def _images(engine: _Engine, payloads: Sequence[memoryview]) -> None:
    """All images together, decoded into the rows of one array."""
    model, work = engine.model, engine.work
    spec = image_spec(model)
    name = model.signature.inputs[0].name
    rows = model.runner.empty(name, (len(payloads), *spec.shape))
    group: list[_Ready] = []
    for index, (item, payload) in enumerate(zip(work.items, payloads, strict=True)):
        try:
            content = decode_base64(payload) if item.encoded else payload
            preprocess_into(content, spec, rows[len(group)], max_pixels=work.max_image_pixels)
        except Exception as problem:
            engine.refuse(index, problem)
        else:
            group.append(_Ready(index, 1))
    if group:
        engine.answer(group, {name: rows[: len(group)]})


def _tensors(engine: _Engine, payloads: Sequence[memoryview]) -> None:
    """Requests of one shape together, as many as the batch may have."""
    model, work = engine.model, engine.work
    groups: dict[object, list[tuple[_Ready, Mapping[str, Array]]]] = {}
    for index, (item, payload) in enumerate(zip(work.items, payloads, strict=True)):
        try:
            call = _call(work, item, payload, model)
        except Exception as problem:
            engine.refuse(index, problem)
            continue
        ready = _Ready(index, call.rows, _formatted(work, model, call))
        # Requests for a model of a fixed size share nothing.
        groups.setdefault(call.shape if model.row_wise else index, []).append((ready, call.inputs))
    for group in groups.values():
        engine.answer([ready for ready, _ in group], merge([inputs for _, inputs in group], model.runner.empty))


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
