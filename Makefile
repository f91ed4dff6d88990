# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart   makes .venv, installs, warms up a tiny model, trains it with reinforcement learning on the CPU
#   make test         the same environment, then the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export GOMP_SPINCOUNT ?= 2000
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart install test test-slow test-gpu check format docs

install: $(VENV)/.installed

# torch first and alone: where pip knows a CPU build, the pinned version takes it, and nothing later replaces it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: install
	SKYRL_SGLANG_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu and not slow"

test-slow: install
	SKYRL_SGLANG_TESTS=1 $(BIN)/python -m pytest -q -m "not gpu"

test-gpu:
	$(PYTHON) -m pytest -q -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install
	$(BIN)/python -m skyrl_train.config.reference > docs/config.md
