# Needs make and Python 3.10 or later. Everything else is installed once into $(VENV).
#   make tune ARGS="--gpu auto --kernels post_res"    arguments for mhc-tune
#   make test ARGS="-k profile"                       arguments for pytest
#   make test VENV= PYTHON=python3                    with a Python that has all it needs (a GPU machine with its own torch)
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cpu    torch without CUDA, a tenth of the download

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

export TILELANG_PRINT_ON_COMPILATION ?= 0

.DEFAULT_GOAL := help
.PHONY: help env tune test lint clean

help:
	@echo "make tune   tune the kernels for the hardware found here, write configs/<gpu>.yaml, show the table"
	@echo "make test   ruff, mypy and every test (those for a GPU are skipped where there is none)"
	@echo "make env    only build the environment in $(VENV)"
	@echo "make lint   only ruff and mypy"
	@echo "make clean  remove the environment and caches; profiles, results and tuning storage stay"

env: $(READY)

tune: $(READY)
	$(PY) -m tuner.cli $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n auto --maxprocesses 16 --dist worksteal $(ARGS)

ifneq ($(READY),)
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit(f"Python: got {v[0]}.{v[1]} from $(PYTHON), wanted 3.10 or later; name one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[test]"
	@touch $@
endif

clean:
	rm -rf $(if $(strip $(VENV)),"$(VENV)") build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tl_kernels mhc tuner tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
