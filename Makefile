# `make demo` and `make test` set up all they need in .venv; `make check` adds lint and types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-lowest test-newest docs lint deps audit types package check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[abliterate,llamacpp,dev]"
	touch $(READY)

demo: setup
	$(BIN)/ollama-forge abliterate run --model demo --name demo --max-measured 16

# two processes with a thread each take half the time of one with two threads: most tests are small
TESTS ?= tests
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test: setup
	$(call PYTEST,$(VENV))

docs: setup
	$(BIN)/mkdocs build --strict

# The lowest versions that pyproject.toml allows, on the lowest Python, and the newest that there are: each in an environment
# of its own (7 GB), with all extras.
ALL := abliterate,llamacpp,cluster,bitsandbytes,lm-eval,notebook,dev
LOWEST := .venv-lowest
LOWEST_PYTHON ?= python3.11
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(PYTHON)
test-lowest: setup
	$(BIN)/uv venv --quiet --clear --python $(LOWEST_PYTHON) $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -e ".[$(ALL)]"
	$(LOWEST)/bin/python scripts/check_lower_bounds.py
	$(call PYTEST,$(LOWEST))

test-newest: setup
	$(BIN)/uv venv --quiet --clear --python $(NEWEST_PYTHON) $(NEWEST)
	$(BIN)/uv pip install --quiet --python $(NEWEST) --upgrade -e ".[$(ALL)]"
	$(call PYTEST,$(NEWEST))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture

# What is imported is declared, and what is declared is imported.
deps: setup
	$(BIN)/deptry .

# Known vulnerabilities of the packages in .venv; without a service that knows them, a line says so.
audit: setup
	$(BIN)/python scripts/check_vulnerabilities.py

types: setup
	$(BIN)/mypy

# The wheel and the sdist: what is in them, and the wheel in a fresh environment.
package: setup
	$(BIN)/python scripts/check_package.py

check: test lint deps audit types package

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
