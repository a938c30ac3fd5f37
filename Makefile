# make demo   the whole road on your laptop: learn, get better by RL, use a tool; report in runs/demo
# make test   style, types, import order, tests
# make lint   the same without the tests
# make clean  remove the environment and caches; runs/ stays yours
#
# Needs python3 >= 3.11 and make; `make test` also a C compiler (one library of the tests builds a C
# extension). Everything goes into .venv, once. Choose with
#   make demo PYTHON=python3.12            another interpreter
#   make demo TORCH=torch==2.12.0          another torch, e.g. to match your CUDA driver
# On Linux pip's default torch is the CUDA build, several GB with its libraries. Without an NVIDIA GPU,
# take the small CPU-only wheel: put PyTorch's CPU wheel index (its address is in the "Get Started"
# selector of pytorch.org) into pip's environment for the first call:
#   PIP_EXTRA_INDEX_URL=<that address> make demo

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= runs/demo

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test lint clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//; 1,4p' Makefile

demo: .venv/.demo
	$(BIN)/trivet run configs/demo.toml --out $(OUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -x -q -n 2 --dist loadfile --timeout 240

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# torch first and alone: it is the large and the choosy one. Its exact version, build tag included,
# then binds every later install, so that no other package can swap it.
.venv/.torch:
	@$(PYTHON) -c 'import sys; v = ".".join(map(str, sys.version_info[:3])); sys.exit(None if sys.version_info >= (3, 11) else "Trivet needs Python 3.11 or newer, and $(PYTHON) is " + v + ". Name another one: make demo PYTHON=python3.12")'
	@echo "Making .venv with $(TORCH). This happens once."
	$(PYTHON) -m venv .venv
	$(PIP) install "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	@touch $@

.venv/.demo .venv/.dev: .venv/.%: .venv/.torch pyproject.toml
	$(PIP) install --constraint .venv/constraints.txt --editable ".[$*]"
	@touch $@
