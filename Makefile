# make quickstart   install into .venv, then train, watch and replay a first two-level agent
# make setup        .venv with everything that development needs
# make check        style, types and the fast tests: before every commit
# make test         all tests, those that train included
# make docs         these pages and the reference as a site in build/site
# make browser      Chromium from npm into build/, for the tests that look at pages; not where one is installed
# make clean        remove .venv and caches; runs/ stays
#
# PYTHON=python3.12 chooses the interpreter. PIP_ARGS goes to the installation of torch: see CONTRIBUTING.md.

PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help quickstart setup lint check test docs browser clean
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

.venv/.docs: .venv/.core
	$(PIP) --editable '.[docs]'
	@touch $@
