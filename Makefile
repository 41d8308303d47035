# Everything that a checkout can do. Environments are built once, in $(VENV), and again when their inputs change.
# `make quickstart` needs Python 3.11 or newer and pip; nothing else.

VENV ?= .venv
JOBS ?= 2
# The first Python that is new enough; `make PYTHON=/path/to/python quickstart` takes another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: help quickstart test lint types docs bench proofs readme clean
.DELETE_ON_ERROR:

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

# On models this small one thread is fastest.
quickstart: $(VENV)/data.stamp ## Distil real digits into a tiny student; writes quickstart/report.html.
	rm -rf quickstart
	OMP_NUM_THREADS=1 $(VENV)/bin/transfuse run recipes/quickstart.yaml --out quickstart

test: $(VENV)/dev.stamp ## Run the whole test suite.
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

lint: $(VENV)/dev.stamp ## Style, formatting and who may import whom.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/dev.stamp ## Check types.
	$(PY) -m mypy

docs: $(VENV)/dev.stamp ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(VENV)/dev.stamp ## Time our step and start-up against plain PyTorch.
	$(PY) -m benchmarks step
	$(PY) -m benchmarks startup

proofs: $(VENV)/dev.stamp ## Train every proof in full and write proofs/results/.
	$(PY) -m proofs run --all

readme: quickstart ## Put the table of a fresh quickstart into README.md.
	$(PY) docs/readme.py quickstart

clean: ## Remove what make built, the environment too.
	rm -rf $(VENV) site dist quickstart

$(PY):
	@test -n "$(PYTHON)" || { echo "transfuse needs Python 3.11 or newer; name one: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/data.stamp: $(INPUTS) | $(PY)
	$(PIP) --editable '.[data]'
	touch $@

$(VENV)/dev.stamp: $(INPUTS) | $(PY)
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/data.stamp
