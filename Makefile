# make demo: set everything up and run the whole path on generated data
# make test: set everything up and pass the tests
# make chaos: the long campaigns, which `make test` leaves out
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= demo

.PHONY: demo test chaos lint install clean
.DELETE_ON_ERROR:

install: $(READY)

# One locked set of versions: pip takes the constraints, so a fresh machine gets what was tested.
$(READY): pyproject.toml deploy/requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medswav needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/requirements.lock -e '.[test]'
	touch $@

demo: install
	$(BIN)/medswav demo --output $(DEMO)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes share the files of tests; Ray's share one cluster, and have the machine to themselves.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile -m 'not ray and not chaos'
	$(BIN)/pytest -m 'ray and not chaos' tests/orchestration

# Campaigns of kills, of three nodes and of scale: they take an hour or so.
chaos: install
	$(BIN)/pytest -m chaos

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
