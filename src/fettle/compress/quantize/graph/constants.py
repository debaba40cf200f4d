"""Parameters and buffers of a captured graph: read them, and put new ones in."""

from __future__ import annotations

from typing import Any

import torch


def is_constant(node: Any) -> bool:
    """Whether a node is a parameter or buffer."""
    return isinstance(node, torch.fx.Node) and node.op == "get_attr"


def constant(graph: torch.fx.GraphModule, node: Any) -> torch.Tensor:
    """The value of a `get_attr` node, detached."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, torch.Tensor)
    return value.detach()


def put_constant(graph: torch.fx.GraphModule, name: str, value: torch.Tensor) -> torch.fx.Node:
    """Store a buffer under a free name and return a node that reads it, at the graph's insertion point."""
    free = _free_name(graph, name)
    graph.register_buffer(free, value.contiguous())
    node = graph.graph.get_attr(free)
    node.meta["val"] = value
    return node


def put_parameter(graph: torch.fx.GraphModule, name: str, value: torch.nn.Parameter) -> torch.fx.Node:
    """Store a parameter under a free name and return a node that reads it, at the graph's insertion point."""
    free = _free_name(graph, name)
    graph.register_parameter(free, value)
    node = graph.graph.get_attr(free)
    node.meta["val"] = value
    return node


def _free_name(graph: torch.fx.GraphModule, name: str) -> str:
    free, count = name, 0
    while hasattr(graph, free):
        count += 1
        free = f"{name}_{count}"
    return free


def drop_unused(graph: torch.fx.GraphModule) -> None:
    """Forget the parameters and buffers that no node reads any more, such as the float form of an int8 weight."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    held = [
        name
        for name, _ in (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    ]
    for name in held:
        if name not in read:
            path, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(path), leaf)
