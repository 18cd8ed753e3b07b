# Each target calls a script or a tool; `make` alone lists them.
BIN := .venv/bin
# Processes that run test files side by side; each starts ranks of its own.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all test-cluster lint bench docs site

help:
	@echo "make quickstart   real text -> tokenizer -> tokens -> a GPT on 2 ranks -> held-out loss -> a sample (6 minutes)"
	@echo "make test         the test suite (20 minutes on 2 cores)"
	@echo "make test-all     the slow tests too"
	@echo "make test-cluster several hosts on this machine, by the real launchers (10 minutes; needs root, docs/cluster.md)"
	@echo "make lint         ruff, mypy, import layers"
	@echo "make bench        speed and memory, as ratios measured in one run"
	@echo "make docs         rewrite the generated tables in docs/"
	@echo "make site         the documentation as a site, in site/"
	@echo "make venv         only create .venv and install"

venv:
	tools/setup_venv.sh

quickstart: venv
	$(BIN)/python tools/quickstart.py

test: venv
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not cluster"

test-all: venv
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not cluster"

test-cluster: venv
	$(BIN)/pytest -m "cluster and not slow" tests/cluster tests/tools/test_cluster.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python tools/bench.py

docs: venv
	$(BIN)/python tools/make_docs.py

site: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
