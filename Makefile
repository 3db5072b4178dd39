# make serve   serve the demo model on http://127.0.0.1:8000
# make test    lint, types and tests: what CI runs; make unit, make e2e: a part of the tests
# make bench   measure this machine and Tandem on it
# make soak    5,000 requests with faults: minutes
# make loadtest  every load scenario for a few seconds against a simulated cluster; its last line is the report
# Every target makes the virtual environment itself when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
ARGS ?=

serve: $(STAMP)
	$(VENV)/bin/tandem serve $(ARGS)

# two files at a time: most tests wait, for processes that start, die and come back. In the order of their names: by
# default the files with the fewest tests come last, and those take longest
test: lint types
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --ignore tests/e2e $(ARGS)

e2e: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/e2e $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/tandem bench $(ARGS)

soak: $(STAMP)
	SOAK_REQUESTS=5000 $(VENV)/bin/python -m pytest tests/e2e/test_soak.py $(ARGS)

loadtest: $(STAMP)
	$(VENV)/bin/python -m loadtests.run $(ARGS)

# torch first and by itself: its pinned CPU build must be in place before anything asks for "any torch"
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: serve test unit e2e lint types bench soak loadtest
