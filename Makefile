# Two commands are all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Versions of what is installed, by name (pip's constraints); LOCK=/dev/null for the newest that pyproject.toml admits.
LOCK ?= requirements/lock.txt
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 30
SEED ?= 0

.PHONY: demo test browser suite test-oldest test-fast lock test-machines chaos gpu docs docs-serve dist lint clean

demo: $(VENV)/installed-demo
	$(BIN)/python -m moco.demo

test: $(VENV)/installed-test
	$(MAKE) lint
	$(MAKE) suite

# As root, Chromium by apt-get where there is no browser; without one the tests of pages are skipped.
browser: $(VENV)/installed-test
	$(BIN)/python tests/support/browser.py

suite: $(VENV)/installed-test browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The same tests with the oldest versions that pyproject.toml admits, in a virtual environment of their own.
test-oldest:
	$(MAKE) suite VENV=.venv-oldest LOCK=requirements/oldest.txt

# The versions in $(VENV), as those with which the tests ran: CONTRIBUTING.md says when.
lock: $(VENV)/installed-test
	$(BIN)/python requirements/lock.py

# What takes no processes of its own and at most two seconds a test: under two minutes.
test-fast: $(VENV)/installed-test browser
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow and not dist"

# The tests of numbers under the instructions of other processors: minutes for each of seven settings.
test-machines: $(VENV)/installed-test
	$(BIN)/python tests/support/machines.py -n $(WORKERS) --dist loadfile

# Signals, damaged files and full disks at random for so many minutes; writes runs/chaos. make chaos MINUTES=30 SEED=1
chaos: $(VENV)/installed-test
	$(BIN)/python -m tests.runs.chaos --minutes $(MINUTES) --seed $(SEED) --out runs/chaos

# Tests, errors and times on an NVIDIA GPU, in under eight minutes after installing; writes runs/gpu.
gpu: $(VENV)/installed-test
	$(BIN)/python benchmarks/gpu.py

# The documentation as a site, in site/; warnings are errors. docs-serve shows it at localhost:8000 and follows changes.
docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# dist/: a source distribution, and the wheel that is made from it, so that nothing else in this folder gets into it.
dist: $(VENV)/installed-test
	rm -rf build dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(VENV)/bin/python pyproject.toml $(LOCK)
	@echo "installing torch and the rest into $(VENV): a minute or more, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[demo]'
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml detection/requirements-ci.txt $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[test]'
	$(BIN)/python detection/install_for_ci.py
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build site *.egg-info
