"""Operations beyond ATen that a captured graph may hold: linear layers whose weights are stored in few bits.

torch computes here what the engines compute. An engine gets a kernel of its own for each: `KERNELS` holds, by runtime,
what to put in an operation's place before the graph is written as ONNX.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # NOTE: only registers the operations; nothing of torch.ao is called
from torch.nn.functional import linear

Tensor = torch.Tensor

_LARGEST_BLOCK = 256  # that ONNX Runtime's kernel for blocks takes


@torch.library.custom_op("fettle::linear_blocks", mutates_args=())
def linear_blocks(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x Wᵀ + bias, where W is stored in blocks along its rows: W = (code − 2^(bits−1)) · scale of the block.

    x: (..., K) float32; codes: (N, K / B, B · bits / 8) uint8, packed by `pack`; scales: (N, K / B) float32, possibly
    negative; bias: (N,) float32. K inputs, N outputs, B weights a block.

    >>> codes = pack(torch.tensor([[[9, 7, 8, 15]]], dtype=torch.uint8), bits=4)
    >>> linear_blocks(torch.ones(1, 4), codes, torch.tensor([[0.5]]), None, 4)
    tensor([[3.5000]])
    """
    return linear(x, unpack_weight(codes, scales, bits=bits), bias)


@linear_blocks.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("fettle::linear_rows", mutates_args=())
def linear_rows(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x W + bias, where W = weight · scale of its column, and x stays as it is.

    x: (..., K) float32; weight: (K, N) int8; scales: (N,) float32, possibly negative; bias: (N,) float32. K inputs, N
    outputs; K has a divisor of 16 or more that is a power of two.

    >>> weight = torch.tensor([[100], [-50]], dtype=torch.int8)
    >>> linear_rows(torch.tensor([[2.55, 0.0]]), weight, torch.tensor([0.01]), None)
    tensor([[2.5500]])
    """
    product = torch.matmul(x, weight.to(torch.float32) * scales)
    return product if bias is None else product + bias


@linear_rows.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("fettle::linear_dynamic", mutates_args=())
def linear_dynamic(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x W + bias in integers: W = weight · scale of its column, and x rounded to uint8 over the range it has just now.

    x: (..., K) float32; weight: (K, N) int8; scales: (N,) float32; bias: (N,) float32. K inputs, N outputs. The range
    is that of the whole of x, extended to hold zero: what ONNX defines for DynamicQuantizeLinear.

    >>> weight = torch.tensor([[100], [-50]], dtype=torch.int8)
    >>> linear_dynamic(torch.tensor([[2.55, 0.0]]), weight, torch.tensor([0.01]), None)
    tensor([[2.5500]])
    """
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], weight.shape[1]))
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = torch.round(-low / step).clamp(0, 255)
    whole = (torch.round(x / step) + zero).clamp(0, 255) - zero
    # In float64 every product and sum of such integers is exact, as in the engine's int32.
    product = torch.matmul(whole.to(torch.float64), weight.to(torch.float64)).to(torch.float32) * (step * scales)
    return product if bias is None else product + bias


@linear_dynamic.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Codes (..., B) uint8 below 2^bits as bytes (..., B · bits / 8): of two 4-bit codes the first is the low half.

    >>> pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), bits=4).tolist()
    [33, 67]
    """
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(stored: Tensor, *, bits: int) -> Tensor:
    """The inverse of `pack`.

    >>> unpack(torch.tensor([33, 67], dtype=torch.uint8), bits=4).tolist()
    [1, 2, 3, 4]
    """
    return stored if bits == 8 else torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)


def unpack_weight(codes: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """The weight (N, K) float32 that `linear_blocks` computes with."""
    centered = unpack(codes, bits=bits).to(torch.float32) - 2 ** (bits - 1)
    weight: Tensor = (centered * scales[:, :, None]).flatten(1)
    return weight


def _as_matmul_nbits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """ONNX Runtime's block-wise kernel, which OpenVINO reads too.

    The same as DequantizeLinear and MatMul would be fused only for inputs of three dimensions: for two, ONNX Runtime
    first makes a Gemm of the product and its bias, and then unpacks the weight anew in every call.
    """
    outputs, blocks, size_bytes = codes.shape
    block = size_bytes * 8 // bits
    # accuracy_level 4: x is rounded to int8 by block. With 8 bits any other level is ten times slower than float.
    attributes = {"K": blocks * block, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
    operands = (x, codes, scales, None, None, bias)
    return _contributed("MatMulNBits", operands, attributes, shape=(*x.shape[:-1], outputs))


def _as_matmul_nbits_of_rows(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The same kernel, whose blocks end at 256: each has its row's scale. The engine rearranges it all on loading."""
    inputs, outputs = weight.shape
    block = min(inputs & -inputs, _LARGEST_BLOCK)
    codes = (weight.t().to(torch.int32) + 128).to(torch.uint8).reshape(outputs, -1, block)
    return _as_matmul_nbits(x, codes, scales[:, None].repeat(1, inputs // block), bias, 8)


def _as_dynamic_quantize_matmul(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """ONNX Runtime's kernel for the whole."""
    return _contributed(
        "DynamicQuantizeMatMul", (x, weight, scales, None, bias), {}, shape=(*x.shape[:-1], weight.shape[1])
    )


def _as_dequantized_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """For OpenVINO, which rounds x by itself, each row in groups, where the weight is stored in integers."""
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    whole = torch.ops.quantized_decomposed.dequantize_per_channel.default(
        weight, scales, zeros, 1, -128, 127, torch.int8
    )
    product = torch.matmul(x, whole)
    return product if bias is None else product + bias


def _as_pattern(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """What Inductor, with frozen weights, turns into oneDNN's integer product and one loop that rounds x.

    The pattern is two dimensions, a zero in int32, and a weight (N, K) that is contiguous: of a transposed view oneDNN
    packs the memory as it lies, which is another matrix. Nothing of the kind stands for blocks: on a CPU with AVX2 the
    kernels of torch 2.13 for float32, `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`, took 8 to 130 times as
    long as float in every shape measured.
    """
    library = torch.ops.quantized_decomposed
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = torch.round(-low / step).clamp(0, 255)
    whole = (torch.round(x / step) + zero).clamp(0, 255).to(torch.uint8).reshape(-1, x.shape[-1])
    rows = library.dequantize_per_tensor.tensor(whole, step, zero.to(torch.int32), 0, 255, torch.uint8)
    columns = library.dequantize_per_channel.default(
        weight.t().contiguous(), scales, torch.zeros_like(scales, dtype=torch.int32), 0, -128, 127, torch.int8
    ).t()
    product = torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns)
    return product.reshape(*x.shape[:-1], weight.shape[1])


def _contributed(
    name: str, operands: tuple[Tensor | None, ...], attributes: dict[str, Any], *, shape: tuple[int, ...]
) -> Tensor:
    """A node of ONNX Runtime's own domain; torch cannot compute it."""
    return torch.onnx.ops.symbolic(
        f"com.microsoft::{name}", operands, attributes, dtype=torch.float32, shape=shape, version=1
    )


LINEAR_BLOCKS: torch._ops.OpOverload = torch.ops.fettle.linear_blocks.default
LINEAR_ROWS: torch._ops.OpOverload = torch.ops.fettle.linear_rows.default
LINEAR_DYNAMIC: torch._ops.OpOverload = torch.ops.fettle.linear_dynamic.default

Kernels = Mapping[torch._ops.OpOverload, Callable[..., Tensor]]

KERNELS: Mapping[str, Kernels] = {
    "onnxruntime": {
        LINEAR_BLOCKS: _as_matmul_nbits,
        LINEAR_ROWS: _as_matmul_nbits_of_rows,
        LINEAR_DYNAMIC: _as_dynamic_quantize_matmul,
    },
    "openvino": {
        LINEAR_BLOCKS: _as_matmul_nbits,
        LINEAR_ROWS: _as_dequantized_product,
        LINEAR_DYNAMIC: _as_dequantized_product,
    },
    "inductor": {
        LINEAR_DYNAMIC: _as_pattern,
    },
}


def with_kernels(program: torch.export.ExportedProgram, runtime: str) -> torch.export.ExportedProgram:
    """The program with the runtime's kernels in the place of fettle's own operations, which no engine knows."""
    kernels = KERNELS[runtime]
    if not any(node.target in kernels for node in program.graph.nodes):
        return program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations
        changed: torch.export.ExportedProgram = program.run_decompositions(dict(kernels))
    return changed
