"""`fettle doctor`, and the command line as a whole."""

import fettle.core.plugins
from fettle.core.errors import MissingExtra
from fettle.runtime.onnxruntime import OnnxRuntime


def test_json(run, tmp_path):
    facts = run("doctor", "--json", home=tmp_path).json
    assert set(facts) == {"hardware", "home", "versions", "runtimes"}
    assert facts["home"] == str(tmp_path)
    assert {"python", "torch", "numpy"} <= set(facts["versions"])
    assert set(facts["runtimes"]) == {"eager", "inductor", "null", "onnxruntime", "openvino"}
    assert facts["runtimes"]["onnxruntime"] == "ready: " + ", ".join(sorted(OnnxRuntime.precisions))
    assert "cores" in facts["hardware"]


def test_a_runtime_that_is_not_installed_is_told_with_its_pip_line(run, tmp_path, monkeypatch):
    load = fettle.core.plugins.load

    def without_openvino(package, name, base):
        if name == "openvino":
            raise MissingExtra("runtime 'openvino' needs openvino: pip install 'fettle-ml[openvino]'")
        return load(package, name, base)

    monkeypatch.setattr("fettle.core.plugins.load", without_openvino)
    facts = run("doctor", "--json", home=tmp_path).json
    assert "pip install 'fettle-ml[openvino]'" in facts["runtimes"]["openvino"]


def test_table_for_people(run, tmp_path):
    ran = run("doctor", home=tmp_path)
    assert ran.code == 0
    assert "onnxruntime ready" in ran.out


def test_help_names_every_command(run, tmp_path):
    ran = run("--help", home=tmp_path)
    assert ran.code == 0
    for command in ("demo", "optimize", "compare", "registry", "serve", "monitor", "doctor"):
        assert command in ran.out


def test_unknown_command(run, tmp_path):
    ran = run("optimise", home=tmp_path)
    assert ran.code == 2
    assert "optimise" in ran.err
