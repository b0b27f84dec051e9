# make quickstart   fit a first model and draw it
# make test         run the tests
# make lint         ruff (lint, format) and mypy
# make docs         build the pages into docs/_build/html
# make clean        remove what the targets above wrote, but not .venv
#
# Each target first makes .venv if there is none and installs what it needs, with the
# versions of constraints.txt; a second call installs nothing. Another Python 3.11 or
# newer: make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin

# One thread per worker: pytest-xdist already fills the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: help quickstart test lint docs clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

quickstart: $(VENV)/.installed-plot
	$(BIN)/python examples/plot_quickstart.py

test: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -b html -W --keep-going docs docs/_build/html

clean:
	rm -rf build dist skode.egg-info docs/_build docs/generated
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A stamp per extra, older than its two sources only when something must be installed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"skode needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
