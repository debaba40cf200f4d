"""Every way a project can be wrong: one line on stderr that names the file, the right exit code, nothing registered."""

import pytest

VALIDATION = 'validation = "data:validation"\n'

# What is written differently in which file, and words of the answer. Exit code 2: the project is wrong.
PROJECT_ERRORS = {
    "not TOML": ({"toml": "name = tiny"}, ["fettle.toml", "not valid TOML"]),
    "empty file": ({"toml": ""}, ["fettle.toml", "name"]),
    "unknown key": ({"toml": {"max_drop": "max_dorp"}}, ["fettle.toml", "budget.max_dorp", "'max_drop'"]),
    "unknown table": ({"toml": {"[budget]": "[buget]"}}, ["fettle.toml", "'buget'", "'budget'"]),
    "wrong type": ({"toml": {"max_drop = 0.05": 'max_drop = "small"'}}, ["fettle.toml", "max_drop"]),
    "bad time limit": ({"toml": {"max_drop = 0.05": 'time_limit = "soon"'}}, ["fettle.toml", "time_limit", "soon"]),
    "negative seed": ({"toml": {"max_drop = 0.05": "seed = -1"}}, ["fettle.toml", "budget.seed", "-1"]),
    "bad name": ({"toml": {'"tiny"': '"My Model"'}}, ["fettle.toml", "name", "My Model"]),
    "no validation": ({"toml": {VALIDATION: ""}}, ["fettle.toml", "validation"]),
    "no colon": ({"toml": {'"model:build"': '"model.build"'}}, ["fettle.toml", "model.build", "module:function"]),
    "no module": ({"toml": {'"model:build"': '"modle:build"'}}, ["fettle.toml", "model.build", "no file modle.py"]),
    "no function": ({"toml": {'"model:build"': '"model:biuld"'}}, ["model.build", "did you mean 'build'"]),
    "no loader": ({"toml": {VALIDATION: 'validation = "data:val"\n'}}, ["fettle.toml", "data.validation", "'val'"]),
    "no train loader": ({"toml": {'"data:train"': '"data:trian"'}}, ["fettle.toml", "data.train", "'train'"]),
    "module raises": ({"model": "1 / 0"}, ["fettle.toml", "model.build", "ZeroDivisionError"]),
    "module does not parse": ({"model": "def build(:"}, ["fettle.toml", "model.build", "SyntaxError"]),
    "module lacks a package": ({"model": "import absent_package"}, ["model.build", "'absent_package'", "installed"]),
    "build raises": ({"model": {"    with torch": '    raise OSError("no weights")\n    with torch'}},
                     ["fettle.toml", "model.build", "OSError: no weights"]),
    "loader raises": ({"data": {"return rows(60, 1)": "return 1 / 0"}}, ["data.validation", "ZeroDivisionError"]),
    "build returns None": ({"model": {"return model.eval()": "return None"}},
                           ["fettle.toml", "model.build", "torch.nn.Module", "NoneType"]),
    "build returns weights": ({"model": {"model.eval()": "model.state_dict()"}}, ["model.build", "OrderedDict"]),
    "example of wrong shape": ({"model": {"zeros(1, 6)": "zeros(1, 5)"}},
                               ["fettle.toml", "model.example", "float32 [1, 5]", "RuntimeError"]),
    "example of wrong type": ({"model": {"zeros(1, 6)": "zeros(1, 6, dtype=torch.int64)"}},
                              ["fettle.toml", "model.example", "int64 [1, 6]"]),
    "example is no tensor": ({"model": {"(torch.zeros(1, 6),)": "([0.0] * 6,)"}}, ["model.example", "tensor", "list"]),
    "example is empty": ({"model": {"(torch.zeros(1, 6),)": "()"}}, ["model.example", "non-empty"]),
    "example without rows": ({"model": {"zeros(1, 6)": "zeros(0, 6)"}}, ["model.example", "at least one row"]),
    "unknown metric": ({"toml": {'"accuracy"': '"acuracy"'}}, ["task.metric", "did you mean 'accuracy'"]),
    "metric to be small": ({"toml": {'"accuracy"': '"mean_squared_error"'}},
                           ["fettle.toml", "task.metric", "higher must be better"]),
    "no such metric function": ({"toml": {'"accuracy"': '"data:score"'}}, ["fettle.toml", "task.metric", "'score'"]),
    "metric raises": ({"toml": {'"accuracy"': '"data:score"'},
                       "data": {"import numpy as np": "import numpy as np\ndef score(o, t): return o.nothing"}},
                      ["fettle.toml", "metric 'score'", "AttributeError"]),
    "metric is no number": ({"toml": {'"accuracy"': '"data:score"'},
                             "data": {"import numpy as np": "import numpy as np\ndef score(o, t): return None"}},
                            ["fettle.toml", "metric 'score'", "TypeError"]),
    "metric is NaN": ({"toml": {'"accuracy"': '"data:score"'},
                       "data": {"import numpy as np": "import numpy as np\ndef score(o, t): return float('nan')"}},
                      ["fettle.toml", "metric 'score'", "finite"]),
    "too few classes": ({"toml": {'["a", "b", "c"]': '["a", "b"]'}}, ["fettle.toml", "task.classes", "2", "3"]),
    "image does not fit": ({"toml": {"[budget]": '[preprocess]\nimage = { mode = "L", resize = 8, crop = 8, '
                                                 "mean = [0.0], std = [1.0] }\n[budget]"}},
                           ["fettle.toml", "preprocess.image", "8, 8"]),
    "image of wrong means": ({"toml": {"[budget]": '[preprocess]\nimage = { mean = [0.0, 1.0] }\n[budget]'}},
                             ["fettle.toml", "mean"]),
}  # fmt: skip

# Exit code 1: the project is well written, and its data or its model are not usable.
DATA_ERRORS = {
    "nothing yielded": ({"return rows(60, 1)": "return []"}, ["split 'validation'", "at least one batch"]),
    "train yields nothing": ({"return rows(80, 0)": "return []"}, ["split 'train'", "at least one batch"]),
    "test yields nothing": ({"return rows(60, 2)": "return []"}, ["split 'test'", "at least one batch"]),
    "no iterable": ({"return rows(60, 1)": "return 7"}, ["split 'validation'", "int"]),
    "no pair": ({"return rows(60, 1)": "return [1, 2]"}, ["split 'validation', batch 0", "pair"]),
    "wrong shape": ({"(x[i : i + 20],": "(x[i : i + 20, :5],"}, ["shape", "[20, 5]", "batch 0"]),
    "wrong data type": ({".astype(np.float32)": ""}, ["float32", "float64", "astype"]),
    "not a number": ({"    y = ": "    x[3, 2] = np.nan\n    y = "}, ["finite", "NaN"]),
    "rows disagree": ({"y[i : i + 20]": "y[i : i + 19]"}, ["20 inputs and 19 targets"]),
    "generator raises": ({"    return rows(60, 1)": "    yield rows(60, 1)[0]\n    raise KeyError('lost')"},
                         ["split 'validation'", "KeyError"]),
    "train raises": ({"    return rows(80, 0)": "    yield rows(60, 1)[0]\n    raise KeyError('lost')"},
                     ["split 'train'", "KeyError"]),
    "other rows each time": ({"return rows(60, 1)": "return rows(60, len(seen.append(0) or seen))",
                              "import numpy as np": "import numpy as np\nseen = []"}, ["split 'validation'", "same"]),
}  # fmt: skip


@pytest.fixture
def refused(run, write_project, tmp_path, eager_only):
    def refuse(code, **files):
        ran = run("optimize", write_project(tmp_path / "p", **files), "--json", home=tmp_path / "home")
        assert ran.out == ""
        assert not (tmp_path / "home" / "registry.db").exists()
        return ran.refused(code)

    return refuse


@pytest.mark.parametrize("case", PROJECT_ERRORS)
def test_wrong_project(refused, case):
    files, words = PROJECT_ERRORS[case]
    line = refused(2, **files)
    for word in ("fettle.toml", *words):
        assert word in line


@pytest.mark.parametrize("case", DATA_ERRORS)
def test_wrong_data(refused, case):
    swaps, words = DATA_ERRORS[case]
    line = refused(1, data=swaps)
    for word in ("fettle.toml", *words):
        assert word in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lambda self, x: super(type(self), self).forward(x) if x.sum() > 0 else x[:, :3]", ["torch.export"]),
        ("lambda self, x: super(type(self), self).forward(x).sum()", ["row for each input row"]),
        ("lambda self, x: super(type(self), self).forward(x) * float('nan')", ["NaN"]),
    ],
)
def test_wrong_model(refused, change, words):
    model = {
        "nn.Sequential(nn.Linear(6, 16)": f"type('Net', (nn.Sequential,), {{'forward': {change}}})(nn.Linear(6, 16)"
    }
    line = refused(1, model=model)
    for word in ("fettle.toml", *words):
        assert word in line


def test_tokens_outside_the_vocabulary(refused):
    line = refused(
        1,
        model={"zeros(1, 6)": "zeros(1, 6, dtype=torch.int64)", "nn.Linear(6, 16)": "nn.EmbeddingBag(9, 16)"},
        data={"    y = ": "    x = np.full((count, 6), 9)\n    y = "},
    )
    assert "Index 0 of input takes value 9" in line
    assert "int64 [20, 6]" in line


@pytest.mark.parametrize("where", ["absent.toml", "absent/fettle.toml", "."])
def test_no_project(run, tmp_path, where):
    line = run("optimize", tmp_path / where, home=tmp_path / "home").refused(2)
    assert str(tmp_path) in line
    assert "does not exist" in line


def test_home_that_is_a_file(run, write_project, tmp_path):
    (tmp_path / "file").write_text("")
    ran = run("optimize", write_project(tmp_path / "p"), home=tmp_path / "file")
    assert str(tmp_path / "file") in ran.refused(1)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--nonsense"], ["a", "b"]])
def test_wrong_usage_is_exit_code_2(run, tmp_path, arguments):
    ran = run("optimize", *arguments, home=tmp_path)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_unreadable_text(run, write_project, tmp_path):
    folder = write_project(tmp_path / "p")
    (folder / "fettle.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in run("optimize", folder, home=tmp_path / "home").refused(2)
