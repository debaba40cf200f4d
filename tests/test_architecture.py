"""The rules of the house, held by the syntax tree: what may import what, and how long anything may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fettle

SOURCE = Path(fettle.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Room -> rooms it may import besides itself. A room that is not here must be added on purpose.
STAGES = frozenset({"compress", "evaluate", "package", "deploy", "serve", "monitor", "dashboard"})
BASE = frozenset({"runtime", "registry", "core"})
MAY_IMPORT = {
    "core": frozenset(),
    "runtime": frozenset({"core"}),
    "registry": frozenset({"core"}),
    **{stage: BASE for stage in STAGES},
    "stages": STAGES | BASE,
    "pipeline": STAGES | BASE | {"stages"},
    "cli": STAGES | BASE | {"stages", "pipeline", "demo"},
    "demo": STAGES | BASE | {"stages", "pipeline"},
    "testing": STAGES | BASE,
    "__init__": STAGES | BASE | {"pipeline", "stages"},
    "__main__": frozenset({"cli"}),
}
# The pipeline and its stages handle the nn.Module itself; nothing that serves or watches imports them.
TORCH_AT_TOP = (
    "pipeline.py",
    "stages/",
    "compress/",
    "evaluate/",
    "testing/",
    "runtime/eager.py",
    "runtime/inductor.py",
    "runtime/_onnx.py",
    "runtime/_onnx_integers.py",
    "runtime/_operations.py",
    "demo/",
)
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "util.py", "helper.py", "misc.py", "common.py"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere below, in full; names imported from a package count as modules."""
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, "imports are absolute"
            yield from (f"{item.module}.{alias.name}" for alias in item.names)


def at_top(path: Path) -> Iterator[str]:
    """What importing the file imports: not what functions do, nor blocks for type checkers."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from imports(child)
            elif not checking and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting.append(child)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@every_file
def test_imports_point_one_way(path):
    allowed = MAY_IMPORT[room(path)] | {room(path)}
    for name in imports(tree(path)):
        parts = name.split(".")
        if (
            parts[0] == "fettle"
            and len(parts) > 1
            and (SOURCE / parts[1]).with_suffix("").exists() | (SOURCE / f"{parts[1]}.py").exists()
        ):
            assert parts[1] in allowed, f"{room(path)} may not import {name}"


@every_file
def test_torch_is_imported_at_the_top_of_few_files(path):
    if not path.relative_to(SOURCE).as_posix().startswith(TORCH_AT_TOP):
        found = [name for name in at_top(path) if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript")]
        assert not found, f"import it in the function that needs it: {found}"


@every_file
def test_files_are_short_and_named_for_what_they_hold(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.name not in FORBIDDEN_NAMES


@every_file
def test_functions_are_short_and_take_few_parameters(path):
    for node in functions(path):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= 60, f"{node.name} has {lines} lines"
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in arguments if name not in ("self", "cls")])
        limit = 14 if room(path) == "cli" else 8  # a command's parameters are its options
        assert count <= limit, f"{node.name} takes {count} parameters"


@every_file
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path):
    for name in imports(tree(path)):
        assert name.split(".")[0] not in FORBIDDEN_MODULES or room(path) == "testing", f"{name} is imported"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), called
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert keywords.get("shell", "False") == "False", f"{called} uses a shell"
            assert called != "torch.load", "weights are safetensors"
            assert keywords.get("allow_pickle", "False") == "False", f"{called} may unpickle"


@every_file
def test_classes_are_named_for_things(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(("Manager", "Helper", "Mixin", "Utils", "Util")), node.name


@every_file
def test_what_is_public_is_explained(path):
    assert path.read_text(encoding="utf-8").strip() == "" or ast.get_docstring(tree(path)), (
        "the module has no docstring"
    )
    for node in tree(path).body:
        public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
            "_"
        )
        if public:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_room_has_its_rule():
    assert {room(path) for path in FILES} <= set(MAY_IMPORT)


def test_the_rules_point_one_way():
    """No two rooms may import each other."""
    for name, allowed in MAY_IMPORT.items():
        assert not [other for other in allowed if name in MAY_IMPORT[other]], name
