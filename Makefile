# Two commands for a newcomer: `make demo` and `make test`. Each works from a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests start hundreds of processes: where this is set each of them compiles every file anew.
unexport PYTHONDONTWRITEBYTECODE
TWO_CORES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test soak check coverage format tables kserve clean

demo: $(VENV)/.installed
	$(BIN)/fettle demo

test: $(VENV)/.installed kserve check
	$(BIN)/python -m pytest $(TWO_CORES) --durations=15

# Five minutes of service under light load, in which nothing may be lost and nothing may grow.
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py --minutes 5 --rate 40

# Apart from `test`: counting lines makes the tests a third slower.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest $(TWO_CORES) --cov --cov-report=term:skip-covered

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/.installed
	$(BIN)/python benchmarks/readme_tables.py

# torch first and pinned: a later requirement must not bring another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# KServe's clients for the tests, in an environment of their own: kserve needs an older protobuf than onnx brings.
kserve: .venv-kserve/.installed

.venv-kserve/.installed:
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/python -m pip install --quiet --disable-pip-version-check 'kserve==0.21.*'
	touch $@

clean:
	rm -rf $(VENV) .venv-kserve .pytest_cache .mypy_cache .ruff_cache .coverage*
