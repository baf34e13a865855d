# `make demo` and `make test` do everything on a fresh machine: Python 3.10 or newer, a C++ compiler and PyPI are enough.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# Arguments for pytest, as in `make test ARGS="-k masks"`, and for the demo.
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.done

.PHONY: demo test lint types check format clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo $(ARGS)

test: lint types check

check: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and alone: a range would let pip look for a newer build and gigabytes of CUDA libraries with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find adakv_compile benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
