# make reproduce [CONFIG=...] [ARGS=...]   the whole chain for one config, in its own environment
# make test | test-slow | test-cuda | lint             what CI runs
PYTHON ?= python3
CONFIG ?= config/digits.yaml
ARGS   ?=
BIN    := .venv/bin

.PHONY: reproduce setup test test-slow test-cuda lint

reproduce: setup
	$(BIN)/python reproduce.py --config $(CONFIG) $(ARGS)

test: setup lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-cuda: setup
	$(BIN)/python -m pytest -m cuda -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
