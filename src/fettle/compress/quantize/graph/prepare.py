"""What every quantizer does to a captured graph first: fewer ways to write the same layer are left."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from fettle.compress.quantize.graph.constants import constant, is_constant, put_constant
from fettle.compress.quantize.graph.fold import FOLDABLE, FoldedNorm, fold_batch_norm

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.mm.default)
_SUM_AND_PRODUCT = aten.addmm.default
_WEIGHTED = (*FOLDABLE, *_PRODUCTS, _SUM_AND_PRODUCT)


def prepare(graph: GraphModule, *, copies: bool = True) -> dict[Node, FoldedNorm]:
    """In place: weights that depend on weights alone are computed, constant products become linear layers, norms fold.

    So weight norm, spectral norm, the sliced projections of cross-attention and `x @ w.T + b` are layers like any
    other. Returns what `fold_batch_norm` does.

    copies: False leaves products and weights that are another weight transposed or sliced as they are, since each needs
        a copy of it: a quantizer makes one anyway, for scales of its own, where one that only narrows would not.

    >>> from fettle.compress.capture import capture
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> graph = capture(layer, (torch.ones(2, 3),))
    >>> _ = prepare(graph)
    >>> [node.op for node in graph.graph.nodes]
    ['get_attr', 'placeholder', 'get_attr', 'call_function', 'output']
    """
    _compute_weights(graph, copies=copies)
    if copies:
        _as_linear_layers(graph)
    return fold_batch_norm(graph)


def _compute_weights(graph: GraphModule, *, copies: bool) -> None:
    """Weights and biases that do not depend on the inputs are computed once, where that takes no more room."""
    known: dict[Node, torch.Tensor | None] = {}
    for node in list(graph.graph.nodes):
        if node.target not in _WEIGHTED:
            continue
        for operand in node.args:
            if not isinstance(operand, Node) or operand.op != "call_function":
                continue
            if operand not in known:
                known[operand] = _value(graph, operand, copies=copies)
            if (value := known[operand]) is not None:
                with graph.graph.inserting_after(operand):
                    # Read by its name from here on, so that layers which share a weight go on sharing it.
                    operand.replace_all_uses_with(put_constant(graph, f"{operand.name}_computed", value))
    graph.graph.eliminate_dead_code()


def _value(graph: GraphModule, node: Node, *, copies: bool) -> torch.Tensor | None:
    """What the node computes, None where it depends on inputs or chance or is larger than what it is computed from.

    None also for a view of a constant, unless it may be copied.
    """
    needed, waiting = dict[Node, None](), [node]
    while waiting:
        one = waiting.pop()
        if one in needed or is_constant(one):
            needed[one] = None
            continue
        if one.op != "call_function" or _is_random(one):
            return None
        needed[one] = None
        waiting += one.all_input_nodes
    sources = [one for one in needed if is_constant(one)]
    values: dict[Node, Any] = {one: constant(graph, one) for one in sources}
    with torch.no_grad():
        for one in graph.graph.nodes:  # in their order, which is one that can be computed
            if one in needed and one not in values:
                args, kwargs = torch.fx.node.map_arg((one.args, one.kwargs), values.__getitem__)
                values[one] = one.target(*args, **kwargs)
    result = values[node]
    if not isinstance(result, torch.Tensor) or result.numel() > sum(values[one].numel() for one in sources):
        return None
    place = result.untyped_storage().data_ptr()
    is_view = any(values[one].untyped_storage().data_ptr() == place for one in sources)
    return result.detach().clone() if copies or not is_view else None


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _as_linear_layers(graph: GraphModule) -> None:
    """`x @ w`, `x @ w + b` and `addmm(b, x, w)` with constants w (in, out) and b (out,)."""
    transposed: dict[str, Node] = {}
    for node in list(graph.graph.nodes):
        if (found := _product(node)) is None:
            continue
        x, weight, bias = found
        key = str(weight.target)
        if key not in transposed:
            with graph.graph.inserting_before(node):
                transposed[key] = put_constant(graph, f"{node.name}_weight", constant(graph, weight).t())
        total = next(iter(node.users), None) if bias is None else None
        if total is not None and (bias := _added(node, total)) is not None:
            node.prepend(bias)  # a constant may be read anywhere, but only before the layer that takes it in
            total.replace_all_uses_with(node)
            graph.graph.erase_node(total)
        # In place, so that the name of the layer it came from stays with the node.
        node.target, node.kwargs = aten.linear.default, {}
        node.args = (x, transposed[key]) if bias is None else (x, transposed[key], bias)
    graph.graph.eliminate_dead_code()


def _product(node: Node) -> tuple[Node, Node, Node | None] | None:
    """x, w and the bias of a product with a constant matrix."""
    if node.target in _PRODUCTS:
        (x, weight), bias = node.args, None
    elif node.target == _SUM_AND_PRODUCT and not node.kwargs:
        bias, x, weight = node.args
        if not is_constant(bias) or bias.meta["val"].ndim != 1:  # type: ignore[union-attr]
            return None
    else:
        return None
    matrix = is_constant(weight) and weight.meta["val"].ndim == 2  # type: ignore[union-attr]
    plain = isinstance(x, Node) and not is_constant(x) and x.meta["val"].ndim >= 2
    return (x, weight, bias) if matrix and plain else None  # type: ignore[return-value]


def _added(product: Node, total: Node) -> Node | None:
    """The vector that a sum, the product's only reader, adds to it."""
    if len(product.users) != 1 or total.target != aten.add.Tensor or total.kwargs:
        return None
    other = [operand for operand in total.args if operand is not product]
    if len(other) != 1 or not is_constant(other[0]):
        return None
    vector: torch.Tensor = other[0].meta["val"]  # type: ignore[union-attr]
    fits = vector.shape == product.meta["val"].shape[-1:] and vector.dtype == product.meta["val"].dtype
    return other[0] if fits else None  # type: ignore[return-value]
