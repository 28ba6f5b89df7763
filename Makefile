# Every target sets up what it needs, pinned by constraints.txt, in .venv; a second run installs nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo demo-rl test test-slow fuzz soak test-engines lint format check bench clean

demo: .venv/.engine
	$(BIN)/penstock demo

demo-rl: .venv/.engine
	$(BIN)/penstock train --demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not engines and not soak"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# The property tests with examples of its own at every run, ten times as many.
fuzz: .venv/.dev
	PENSTOCK_HYPOTHESIS=fuzz $(BIN)/python -m pytest -n 2 -o faulthandler_timeout=3600 -m "not slow and not engines and not soak" \
		$$(grep -rl --include='test_*.py' hypothesis tests)

soak: .venv/.dev
	$(BIN)/python -m pytest -m soak -o faulthandler_timeout=0

# Real engines: PENSTOCK_VLLM_PYTHON and PENSTOCK_SGLANG_PYTHON name the interpreters that have them;
# scripts/install_engines.sh FOLDER makes some. See docs/servers.md.
test-engines: .venv/.dev
	$(BIN)/python -m pytest -m engines -rs tests/engines

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint test

# PENSTOCK_VLLM_PYTHON=/path/to/venv/bin/python puts a real vLLM beside the embedded engine.
bench: .venv/.bench
	$(BIN)/python bench/clients.py --plot docs/img/clients.svg
	$(BIN)/python bench/rows.py
	$(BIN)/python bench/tokens.py

clean:
	rm -rf .venv build demo-out demo-rl-out .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.created:
	$(PYTHON) -c 'import sys; sys.exit("penstock needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

.venv/.engine: .venv/.created pyproject.toml constraints.txt
	$(PIP) --editable '.[engine]'
	touch $@

.venv/.dev: .venv/.engine
	$(PIP) --editable '.[engine,dev]'
	touch $@

.venv/.bench: .venv/.engine
	$(PIP) --editable '.[engine,bench]'
	touch $@
