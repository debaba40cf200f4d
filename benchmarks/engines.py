"""Every engine that the benchmarks time, each at its best ordinary setting: one thread, numpy in, numpy out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
import torch._inductor.config
from numpy.typing import NDArray
from torch import nn

Images = NDArray[np.float32]
Predict = Callable[[Images], NDArray[Any]]

ROWS_PER_CALL = 100


def export_onnx(model: nn.Module, example: tuple[torch.Tensor, ...], path: Path) -> Path:
    """The float model with a free batch size, input `images`, output `logits`."""
    with _quiet():
        torch.onnx.export(
            model,
            example,
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    return path


def load_eager(model: nn.Module) -> Predict:
    """torch without compilation."""

    def predict(images: Images) -> NDArray[Any]:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]

    return predict


def load_compiled(model: nn.Module) -> Predict:
    """torch.compile for each batch size, weights frozen: 1.6 times as fast at batch 1 as without."""
    compiled = torch.compile(model, dynamic=False)
    seen: set[tuple[int, ...]] = set()

    def predict(images: Images) -> NDArray[Any]:
        # Freezing works under no_grad only, and Dynamo reads it from the global configuration, not from `options`.
        with torch.no_grad():
            if images.shape in seen:
                return compiled(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]
            seen.add(images.shape)
            with torch._inductor.config.patch(freezing=True):
                return compiled(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]

    return predict


def load_onnxruntime(path: Path) -> Predict:
    """ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]  # type: ignore[no-any-return]


def load_openvino(path: Path, *, precision: str = "f32", batch: int | None = None) -> Predict:
    """OpenVINO on the CPU from ONNX or IR, for one batch size where it is given: about 8 percent faster at batch 1.

    precision: of what is not quantized, "f32" or "bf16".
    """
    core = openvino.Core()
    model = core.read_model(path)
    if batch is not None:
        shape = model.input(0).partial_shape
        shape[0] = batch
        model.reshape(shape)
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = core.compile_model(model, "CPU", settings)
    return lambda images: compiled(images)[0]  # type: ignore[no-any-return]


def predict_all(predict: Predict, images: Images, *, rows: int = ROWS_PER_CALL) -> NDArray[Any]:
    """The logits of many images, `rows` at a time."""
    parts = [np.array(predict(images[start : start + rows])) for start in range(0, len(images), rows)]
    return np.concatenate(parts)


@contextmanager
def _quiet() -> Any:
    """The ONNX exporter warns about parts that this model does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
