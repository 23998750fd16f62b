# `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test fast lint format bench soak lock stubs clean

PYTHON := .venv/bin/python
MINUTES ?= 60

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install what is missing; leaves .venv/bin/ebi
	@tools/setup

demo: setup ## encrypt a real disk image and start a volume from it, on a real kernel's dm_crypt
	@tests/vm/run $(PYTHON) -m tests.demo

test: setup ## all tests, csi-sanity among them
	@tools/test

fast: setup ## the tests that need no kernel, and lint
	@$(PYTHON) -m pytest tests/unit

lint: setup ## ruff, mypy and import-linter alone
	@$(PYTHON) -m pytest tests/unit/test_lint.py

format: setup ## let ruff format and repair what it can
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

bench: setup ## measure, and write docs/benchmarks.md
	@$(PYTHON) -m tests.bench

soak: setup ## random calls on volumes for MINUTES=n
	@tests/vm/run --seconds $$(($(MINUTES) * 60 + 600)) $(PYTHON) -m tests.soak $(MINUTES)

lock: setup ## renew requirements/*.lock; UPGRADE=--upgrade takes newer versions
	@tools/lock $(UPGRADE)

stubs: setup ## generate csi/stubs from proto/
	@$(PYTHON) -m csi.generate

clean: ## remove all that setup and the tests made
	rm -rf .venv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
