# The same commands for people and for CI; `make` alone lists them.
#
# Needs make, a POSIX shell and Python 3.11 or newer; everything else comes into .venv from
# constraints.txt, checked by hash. Package indexes are the user's own affair: pip's and uv's own
# settings name them, this repository names none.

# Candidates, best first: 3.11 is what constraints.txt is locked and tested for.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python
SEED ?=
BENCH ?= *
LOCK_FLAGS ?=
PYTEST_FLAGS ?=

BIN := .venv/bin
# Written last, with the folder that the scripts of .venv point into.
STAMP := .venv/.setup-done
# There from the first installed file until all are: a .venv with it is half made.
STARTED := .venv/.setup-started
# Empty for a half-made .venv, or when the checkout or its Python has moved: no file's date tells.
STANDS := $(shell test ! -e $(STARTED) && test -e .venv/pyvenv.cfg && test -x $(BIN)/python \
  && test "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" && echo yes)

# Large wheels on slow lines and compiling on busy machines take longer than uv's 30 s and 60 s.
export UV_HTTP_TIMEOUT ?= 300
export UV_COMPILE_BYTECODE_TIMEOUT ?= 600

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all bench lint format lock schema clean FORCE

help: ## list the targets
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-16s %s\n", $$1, $$2}'
	@echo "Options: PYTHON=python3.12 (setup), SEED=1 (demo), PYTEST_FLAGS='-k split' (every test),"
	@echo "         BENCH=name (bench), LOCK_FLAGS=--upgrade (lock)"

# ---- set-up -------------------------------------------------------------------------------------

# Says why a candidate is of no use; silent for a good one. Runs on any Python, even 2.
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("is version %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("cannot make virtual environments (Debian, Ubuntu: install python3-venv)")
endef
export CHECK_PYTHON

define FIND_PYTHON
found=; tried=; \
for candidate in $(PYTHON); do \
  if ! command -v $$candidate >/dev/null 2>&1; then continue; fi; \
  if why=$$($$candidate -c "$$CHECK_PYTHON" 2>&1); then found=$$candidate; break; fi; \
  tried="$$tried\n  $$candidate: $$(printf '%s' "$$why" | head -n 1)"; \
done; \
if [ -z "$$found" ]; then \
  printf 'make setup: no Python 3.11 or newer among: %s%b\n' "$(PYTHON)" "$$tried" >&2; \
  echo "  install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
  exit 2; \
fi
endef

# True only in a whole virtual environment. A half-deleted one runs as the machine's own Python, and
# installing there would change the machine.
IS_VENV := import sys, pip; sys.exit(sys.prefix == sys.base_prefix)
# Third guard of the same: given no --python, uv refuses everything but a virtual environment.
UV_INSTALL := VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet

setup: $(STAMP) ## build .venv from constraints.txt (quick when nothing changed)

# A half-made .venv is made anew: what an interrupted installer left behind cannot be trusted. A
# whole one is only brought up to date. $(STARTED) outlives the deletion, so that an interrupted
# deletion is seen too.
$(STAMP): pyproject.toml constraints.txt $(if $(STANDS),,FORCE)
	@if [ -e $(STARTED) ] || ! $(BIN)/python -c "$(IS_VENV)" 2>/dev/null \
	    || { [ -e $(STAMP) ] && [ "$$(cat $(STAMP))" != "$$(pwd -P)" ]; }; then \
	  $(FIND_PYTHON); \
	  echo "make setup: new .venv with $$($$found --version)"; \
	  mkdir -p .venv && : > $(STARTED) \
	    && find .venv/ -mindepth 1 -maxdepth 1 ! -name $(notdir $(STARTED)) -exec rm -rf {} + \
	    && $$found -m venv --without-pip .venv \
	    && $(BIN)/python -m ensurepip --default-pip >/dev/null; \
	fi
	@: > $(STARTED)
	@awk '/^uv==/ {on = 1} on {print} on && !/\\$$/ {exit}' constraints.txt > .venv/uv.txt
	@$(BIN)/python -m pip --require-virtualenv install --quiet --no-deps --require-hashes \
	  --requirement .venv/uv.txt
	$(UV_INSTALL) --require-hashes --no-build --compile-bytecode --requirement constraints.txt
	$(UV_INSTALL) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q core tuner
	@$(BIN)/python -m core.kernels.ready
	@rm $(STARTED)
	@pwd -P > $(STAMP)

lock: ## write constraints.txt anew from pyproject.toml
	@test -x $(BIN)/uv || $(MAKE) setup
	$(BIN)/uv pip compile pyproject.toml --quiet --group dev --all-extras --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python $(BIN)/python $(LOCK_FLAGS) --output-file constraints.txt

schema: setup ## write search_spaces/schema.json anew from the code
	$(BIN)/python -c "from pathlib import Path; from tuner.spaces.schema import write_schema; \
	  write_schema(Path('search_spaces/schema.json'))"

# ---- use ----------------------------------------------------------------------------------------

demo: setup .demo/drawn-posters ## draw posters and run a real study on them, offline
	$(BIN)/tuner search demo --data .demo/drawn-posters --weights none $(if $(SEED),--seed $(SEED))

.demo/drawn-posters: | setup
	$(BIN)/tuner data synth .demo/drawn-posters --images 600

# ---- checks -------------------------------------------------------------------------------------

# Under 12 minutes whatever happens: no test starts after 600 s, and few go on for over 110 s.
# Two files at a time, as most tests keep one core busy; those of one file share what they set up.
test: setup ## run the quick tests (under 12 minutes)
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser" -n 2 --dist loadfile \
	  --timeout=110 --session-timeout=600 $(PYTEST_FLAGS)

# Tests that wait for Rays of their own to start, die and come back; those that failed alone again:
# make test-slow PYTEST_FLAGS=--last-failed
test-slow: setup ## run the tests that `make test` leaves out (an hour and more)
	$(BIN)/python -m pytest -m "slow or gpu or browser" --timeout=900 --durations=30 $(PYTEST_FLAGS)

test-all: setup ## run every test that this machine can run
	$(BIN)/python -m pytest --timeout=900 --durations=30 $(PYTEST_FLAGS)

# A benchmark is a script, tests/benchmarks/bench_NAME.py, that prints its figures.
bench: setup ## run the benchmarks, or one: make bench BENCH=name
	@for script in tests/benchmarks/bench_$(BENCH).py; do \
	  test -e "$$script" || { echo "make bench: no benchmark $$script" >&2; exit 2; }; \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; \
	done

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove all that was made here but .venv
	rm -rf .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
