# Every target sets up what it needs in a virtual environment of the checkout (VENV, .venv unless told otherwise).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all check format notebooks bench clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.run
	$(BIN)/locedit demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest --runslow

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell locedit benchmarks analyses README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/.dev
	$(BIN)/python analyses/run_notebooks.py

bench: $(VENV)/.dev
	missed=0; for name in integrated_gradients fisher pcgu patching path_patching restricted_step extraction; do \
	  $(BIN)/python -m benchmarks.$$name || missed=1; done; exit $$missed

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "locedit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.run
