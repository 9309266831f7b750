# make demo | check | test | test-all | lint | docs | clean. Needs Python 3.11+ and make; everything else goes into .venv.
VENV ?= .venv
PYTHON ?= python3
# Where the CPU build of torch is; `make demo TORCH_INDEX=` takes the platform's usual build, with CUDA on Linux.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# One thread per test worker: small models gain nothing from more, and threads on busy cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
# What `make check` runs: a part of every layer that finds most mistakes within a minute or two.
FAST := tests/test_layout.py tests/core tests/draft_length tests/drafters tests/quant/test_int4.py tests/generation/test_enable.py

demo: $(VENV)/installed
	$(BIN)/specdec demo

# For the loop of a developer: everything static, and the fast tests.
check: $(VENV)/installed-dev lint
	$(PYTEST) $(FAST)

test: $(VENV)/installed-dev lint
	$(PYTEST)

test-all: $(VENV)/installed-clients lint
	$(PYTEST) -m "full or not full"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The guide as a site, in build/docs; a broken link or a public name that is not found fails the build.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/torch: constraints.txt
	@echo "making $(VENV), with torch first (a few minutes on a slow line)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable ".[dev]"
	@touch $@

# lm_eval without its dependencies (over 200 MB, one of them under the LGPL): the tests use its model class alone,
# which needs only `requests` in addition.
$(VENV)/installed-clients: $(VENV)/installed-dev
	$(PIP) requests
	$(PIP) --no-deps lm_eval
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo check test test-all lint docs clean
