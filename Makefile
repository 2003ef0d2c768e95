# The one list of developer commands. Each target makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# DeepSpeed's source distribution would otherwise try to compile its operators while it is installed.
export DS_BUILD_OPS := 0

.PHONY: demo families check test bench docs lock clean help

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP) ## the whole life of a captioner on this machine, below runs/demo
	RAYCAP_RUNS=$(CURDIR)/runs $(BIN)/python jobs/demo.py

families: $(STAMP) ## the four model families trained equally long on the demo's images, side by side, below runs/families
	RAYCAP_RUNS=$(CURDIR)/runs $(BIN)/python jobs/compare_families.py

check: $(STAMP) ## ruff, mypy --strict, import-linter, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q tests/unit

test: $(STAMP) ## everything that needs no GPU
	$(BIN)/pytest tests

bench: $(STAMP) ## measurements; NAME=x runs one. Figures go to tests/bench/LOG.md by hand
	$(BIN)/python -m tests.bench $(NAME)

docs: $(STAMP) ## write the generated help in jobs/README.md and the tree in README.md
	$(BIN)/python tests/unit/test_docs.py

lock: $(STAMP) ## write cluster/requirements.lock from what is installed
	$(BIN)/python cluster/lock.py > cluster/requirements.lock.new && mv cluster/requirements.lock.new cluster/requirements.lock

clean: ## remove .venv and what the demo wrote
	rm -rf $(VENV) runs
