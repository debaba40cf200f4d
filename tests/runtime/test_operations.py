"""The operations in torch compute what is written; the files hold the kernels, and the engines agree."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.compress.quantize.numerics.blocks import quantize_blocks, quantize_rows
from fettle.core import plugins
from fettle.core.errors import ExportError
from fettle.core.runner import RuntimeBase
from fettle.core.signature import Signature, TensorSpec
from fettle.runtime._operations import LINEAR_BLOCKS, LINEAR_DYNAMIC, LINEAR_ROWS, pack
from fettle.testing.runtimes import seal

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_dynamic(x, weight, scales, bias):
    """One multiplication at a time, in Python's own integers and floats."""
    flat = x.reshape(-1, x.shape[-1]).tolist()
    values = [value for row in flat for value in row]
    low, high = min(0.0, min(values)), max(0.0, max(values))
    step = (high - low) / 255 or 1.0
    zero = max(0, min(255, round(-low / step)))
    rows = []
    for row in flat:
        whole = [max(0, min(255, round(value / step) + zero)) - zero for value in row]
        sums = [sum(q * w for q, w in zip(whole, column, strict=True)) for column in weight.t().tolist()]
        rows.append([total * step * scale for total, scale in zip(sums, scales.tolist(), strict=True)])
    found = torch.tensor(rows).reshape(*x.shape[:-1], weight.shape[1])
    return found if bias is None else found + bias


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (1, 16), (2, 1, 3, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["both signs", "positive", "negative", "zeros"])
def test_dynamic_multiplies_integers(shape, with_bias, kind, generator):
    x = torch.randn(shape, generator=generator)
    x = {"both signs": x, "positive": x.abs(), "negative": -x.abs(), "zeros": x * 0}[kind]
    weight = torch.randint(-127, 128, (16, 7), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(7, generator=generator), torch.randn(7, generator=generator) if with_bias else None
    found = LINEAR_DYNAMIC(x, weight, scales, bias)
    want = slow_dynamic(x, weight, scales, bias)
    assert found.shape == want.shape
    # A value half-way between two steps may go the other way in float32; nearly every sum has none.
    assert float((found - want).abs().median()) <= 1e-4
    step = (max(0.0, float(x.max())) - min(0.0, float(x.min()))) / 255
    assert torch.allclose(found, want, atol=127 * step + 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_blocks_multiply_the_restored_weight(bits, with_bias, generator):
    codes = torch.randint(0, 2**bits, (7, 2, 32), generator=generator).to(torch.uint8)
    scales = torch.randn(7, 2, generator=generator)
    x, bias = torch.randn(3, 64, generator=generator), torch.randn(7, generator=generator) if with_bias else None
    want = torch.zeros(3, 7) if bias is None else bias.repeat(3, 1)
    for output in range(7):
        for index in range(64):
            value = (int(codes[output, index // 32, index % 32]) - 2 ** (bits - 1)) * scales[output, index // 32]
            want[:, output] += x[:, index] * value
    assert torch.allclose(LINEAR_BLOCKS(x, pack(codes, bits=bits), scales, bias, bits), want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("operation", [LINEAR_BLOCKS, LINEAR_ROWS, LINEAR_DYNAMIC])
def test_torch_finds_the_operation_well_formed(operation):
    whole = torch.full((4, 3), 2, dtype=torch.int8), torch.ones(3), None
    blocks = torch.full((3, 1, 4), 129, dtype=torch.uint8), torch.ones(3, 1), torch.ones(3), 8
    arguments = (torch.randn(2, 4), *(blocks if operation is LINEAR_BLOCKS else whole))
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_rows_give_no_rows():
    assert LINEAR_DYNAMIC(torch.ones(0, 4), torch.ones(4, 3, dtype=torch.int8), torch.ones(3), None).shape == (0, 3)


class Blocks(nn.Module):
    """One layer, 64 to 48, in blocks; `rank` of its input."""

    def __init__(self, *, bits, block, with_bias):
        super().__init__()
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8
        codes, scales = quantize_blocks(weight, bits=bits, block=block)
        self.register_buffer("codes", pack(codes, bits=bits))
        self.register_buffer("scales", scales)
        self.bias, self.bits = nn.Parameter(torch.linspace(-1, 1, 48)) if with_bias else None, bits

    def forward(self, x):
        return LINEAR_BLOCKS(x, self.codes, self.scales, self.bias, self.bits)


def export(name, model, shape, folder):
    folder.mkdir()
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", *shape))
    signature = Signature(
        inputs=(spec,), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", *shape[:-1], 48)),)
    )
    runtime = plugins.load("fettle.runtime", name, RuntimeBase)()
    runtime.export(export_program(model, (torch.randn(2, *shape),)), folder, signature)
    return runtime, signature


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("shape", "bits", "block", "with_bias"),
    [((64,), 4, 32, True), ((5, 64), 4, 64, False), ((5, 64), 8, 32, True), ((64,), 8, 64, False)],
)
def test_engines_compute_blocks(name, shape, bits, block, with_bias, tmp_path):
    model = Blocks(bits=bits, block=block, with_bias=with_bias)
    runtime, signature = export(name, model, shape, tmp_path / "model")
    runner = runtime.load(seal(tmp_path / "model", signature, precision=f"int{bits}-weights"), threads=1)
    for rows in (1, 3, 32):
        x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))
        want, found = model(x).detach(), torch.from_numpy(runner(x.numpy()))
        # The engines round x to int8 by block; measured 0.6 percent of the spread, and 1 allowed.
        assert float((found - want).square().mean().sqrt()) < 0.01 * float(want.std())


class Rows(nn.Module):
    """One layer with a scale for each row."""

    def __init__(self, inputs, *, with_bias):
        super().__init__()
        weight = torch.randn(48, inputs, generator=torch.Generator().manual_seed(0)) / 8
        codes, scales = quantize_rows(weight, bits=8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 48)) if with_bias else None

    def forward(self, x):
        return LINEAR_ROWS(x, self.codes, self.scales, self.bias)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("shape", "with_bias"), [((64,), True), ((5, 96), False), ((5, 1024), True)])
def test_engines_compute_rows(name, shape, with_bias, tmp_path):
    """Rows of one block, of three that are no power of two, and longer than ONNX Runtime's blocks."""
    model = Rows(shape[-1], with_bias=with_bias)
    runtime, signature = export(name, model, shape, tmp_path / "model")
    runner = runtime.load(seal(tmp_path / "model", signature, precision="int8-weights"), threads=1)
    for rows in (1, 3, 32):
        x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))
        weight = model.codes.to(torch.float64) * model.scales.to(torch.float64)
        want = x.to(torch.float64) @ weight + (0 if model.bias is None else model.bias.detach())
        assert torch.allclose(model(x).detach(), want.to(torch.float32), atol=1e-4)
        # As with blocks, the engines round x to int8.
        assert float((torch.from_numpy(runner(x.numpy())) - want).square().mean().sqrt()) < 0.01 * float(want.std())


@pytest.mark.parametrize(("bits", "size_bytes"), [(4, 48 * 64 // 2), (8, 48 * 64)])
def test_the_file_holds_the_packed_weights_and_one_kernel(bits, size_bytes, tmp_path):
    export("onnxruntime", Blocks(bits=bits, block=32, with_bias=True), (64,), tmp_path / "model")
    graph = onnx.load(tmp_path / "model" / "model.onnx").graph
    assert [(node.domain, node.op_type) for node in graph.node] == [("com.microsoft", "MatMulNBits")]
    assert max(len(item.raw_data) for item in graph.initializer) == size_bytes


def test_eager_refuses_what_it_would_only_simulate(tmp_path):
    with pytest.raises(ExportError, match="linear_blocks"):
        export("eager", Blocks(bits=4, block=32, with_bias=True), (64,), tmp_path / "model")
