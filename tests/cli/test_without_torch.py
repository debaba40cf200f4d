"""Where torch is not installed: only what needs it asks for it, by its pip line."""

import os
import subprocess
import sys

import pytest

# Not `sys.modules["torch"] = None`: scipy takes that for an installed torch.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
NO_TORCH, NO_SKLEARN = WITHOUT.format(package="torch"), WITHOUT.format(package="sklearn")


@pytest.mark.parametrize("command", ["optimize", "demo"])
def test_what_needs_torch_names_the_extra(process, write_project, tmp_path, command):
    project = [write_project(tmp_path / "p")] if command == "optimize" else []
    line = process(command, *project, home=tmp_path / "home", before=NO_TORCH).refused(1)
    assert line == f"fettle: fettle {command} needs torch: pip install 'fettle-ml[optimize]'"


def test_the_demo_names_its_own_extra(process, tmp_path):
    line = process("demo", home=tmp_path / "home", before=NO_SKLEARN).refused(1)
    assert line == "fettle: fettle demo needs sklearn: pip install 'fettle-ml[demo]'"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["registry", "list", "--json"],
        ["registry", "show", "tiny"],
        ["compare", "tiny", "original"],
        ["monitor", "report", "tiny", "--json"],
        ["doctor", "--json"],
    ],
)
def test_what_does_not_need_torch_works(process, tiny, arguments):
    ran = process(*arguments, home=tiny.home, before=NO_TORCH)
    assert ran.code == 0, ran.err
    assert ran.out


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom fettle.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'httptools', 'uvloop', 'pandas', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
