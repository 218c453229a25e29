# Everything runs from .venv, which is made where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test check format faults

help: ## Show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Make .venv and install the project with its development tools, pinned

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); expected Python 3.11 or newer. Try: make setup PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Train a small Nemo on the shipped conversations and let it answer
	@OMP_NUM_THREADS=1 $(BIN)/python -m magnum_train.demo # set, so that torchrun does not warn; training sets its own

test: setup ## Run every test, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

faults: setup ## Kill ranks, fill disks, flip bits, stop clocks; print what became of the runs
	$(BIN)/python benchmarks/faults.py runs/faults.json

check: setup ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Bring the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
