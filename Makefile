# make run, make test: on a machine with python3 (3.11 or newer) and make, nothing else.

PYTHON ?= python3
JOBS ?= 6
MINUTES ?= 30
FULL ?= 1
BIN := .venv/bin
RESULTS ?= benchmarks/results
CORE := $(addprefix shmstore/engine/, core.c core.h digest.c module.c)
# Says which engine runs, and how to get the other.
ENGINE := -c 'from shmstore.engine.core import describe; print("engine:", describe())'
# Writes what the core is compiled with, if that has changed.
TOOLCHAIN := import os, pathlib, shutil, sysconfig; \
  compiler = shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0]); \
  headers = os.path.exists(sysconfig.get_path("include") + "/Python.h"); \
  file, found = pathlib.Path(".venv/toolchain"), f"{compiler} {headers}"; \
  file.exists() and file.read_text() == found or file.write_text(found)

.PHONY: run test oldest faults sanitize browser soak bench bench-quick peers check format docs package wheel clean FORCE

run: .venv/run.stamp  ## the demo: 4 Gunicorn workers, one shared store; Ctrl-C stops all
	$(BIN)/gunicorn -c deploy/gunicorn.conf.py --chdir examples/demo app:app

test: .venv/test.stamp  ## the whole suite; needs no services and no root
	$(BIN)/python -m pytest -n $(JOBS) --maxschedchunk 2

oldest: .venv-oldest/test.stamp  ## the whole suite with the oldest version of each dependency
	.venv-oldest/bin/python -m pytest -n $(JOBS) --maxschedchunk 2

faults: .venv/test.stamp  ## crash safety, model and policy with their full numbers, a verdict a line; minutes
	$(BIN)/python tests/faults/report.py -n $(JOBS) --maxschedchunk 1

sanitize: .venv/test.stamp  ## the C core under three sanitizers; minutes, make sanitize FULL=0 for less
	SHMSTORE_FULL=$(FULL) $(BIN)/python -m pytest -n 2 --maxschedchunk 1 tests/sanitize

browser: .venv/test.stamp  ## the pages in a real Chromium; installs one if it can (as root, or by sudo), else fails
	$(BIN)/python tests/support/chromium.py
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1 tests/browser

soak: .venv/test.stamp  ## half an hour of visitors while everything is killed at random; make soak MINUTES=2 for less
	$(BIN)/python tests/support/soak.py --minutes $(MINUTES)

bench: .venv/bench.stamp  ## speed beside Redis, memcached, uWSGI, ...: 15 minutes, nothing else on the machine
	$(BIN)/python -m benchmarks --json $(RESULTS)/full.json --svg $(RESULTS) --markdown $(RESULTS)/full.md

bench-quick: .venv/bench.stamp  ## the same peers, fewer rounds: 3 minutes
	$(BIN)/python -m benchmarks --quick --json $(RESULTS)/quick.json

peers: .venv/peers.stamp  ## own tests of Flask, Django, Starlette and others over our sessions; needs a package index
	PYTHONPATH=. $(BIN)/python tests/support/peers.py

check: .venv/test.stamp  ## lint and types; warnings of the C compiler are errors here, not where users install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tests/support/built_core.py

format: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/docs.stamp  ## the documentation as a site, site/index.html; a warning is an error
	$(BIN)/python -m sphinx --builder html --fresh-env --fail-on-warning --keep-going --nitpicky --quiet \
	  --conf-dir docs --doctree-dir .venv/doctrees . site

package: .venv/package.stamp  ## dist/: sdist and a wheel for each platform, tried in environments of their own
	$(BIN)/python tests/support/package_trial.py $(TRIAL)

wheel: .venv/test.stamp  ## dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-oldest dist build site .mypy_cache .pytest_cache .ruff_cache

.venv/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "shmstore needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv \
	  || { rm -rf .venv; echo "python3 cannot make environments: apt install python3-venv"; exit 1; }
	@touch $@

.venv/toolchain: .venv/made.stamp FORCE
	@$(BIN)/python -c '$(TOOLCHAIN)'

.venv/run.stamp: .venv/made.stamp .venv/toolchain pyproject.toml setup.py $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gunicorn]'
	@$(BIN)/python $(ENGINE)
	@touch $@

# pip 25.1 is the first that reads dependency groups. The oldest Gunicorn that we support has tests of its own.
.venv/test.stamp: .venv/made.stamp .venv/toolchain pyproject.toml setup.py $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group check
	@$(BIN)/python $(ENGINE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/oldest \
	  'gunicorn==23.0.*'
	@touch $@

.venv-oldest/test.stamp: .venv/made.stamp .venv/toolchain pyproject.toml setup.py $(CORE) tests/support/oldest.py
	rm -rf .venv-oldest
	$(BIN)/python -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	.venv-oldest/bin/python tests/support/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e . --group test --constraint .venv-oldest/constraints.txt
	@touch $@

# Flask's tests need an older pytest than ours.
.venv/peers.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target .venv/peers --group peers
	@touch $@

# The reference imports the package, with all that it can use.
.venv/docs.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group docs
	@touch $@

.venv/package.stamp: .venv/made.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group wheels \
	  || echo "no compiler for other platforms can be had here: their wheels will be missing"
	@touch $@

# Peers that cannot be installed here are named in the tables. memcached is the system's: apt install memcached.
.venv/bench.stamp: .venv/made.stamp .venv/toolchain pyproject.toml setup.py $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench-uwsgi \
	  || echo "uWSGI cannot be built here: it will be missing"
	@touch $@
