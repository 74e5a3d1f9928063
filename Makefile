# Everything sets itself up: a fresh machine needs Python (3.10 to 3.13) and make.
#   make test ARGS="-k redis -x"      arguments for pytest
#   make test PYTHON=python3.13       the interpreter of a new environment

PYTHON ?= python3
ARGS ?=
# The tests mostly wait for servers and workers: more processes than cores.
PROCESSES ?= 4
VENV := .venv
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help test demo check docs pictures matrix audit clean bench bench-full fuzz chaos celery-suite

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

test: $(VENV)/.ready-test ## run the tests; ARGS="-k x" goes to pytest, PROCESSES=0 runs them in one process
	@$(PY) -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

demo: $(VENV)/.ready-demo ## run the example under faults and count invoices; ARGS="…" goes to it
	@$(PY) -m example_project.simulate $(ARGS)

check: $(VENV)/.ready-test $(VENV)/.ready-dev ## lint, format, types, import rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict celery_idem tests/typing
	$(VENV)/bin/pyright --pythonpath $(PY) tests/typing
	$(VENV)/bin/lint-imports

docs: $(VENV)/.ready-docs ## build the documentation into build/site; it needs no network
	@$(PY) -m mkdocs build --strict
	@echo "build/site/index.html"

pictures: $(VENV)/.ready-test ## make the pictures of inbox and command line in docs/img anew; it needs Chromium
	@IDEM_PICTURES=1 $(PY) -m pytest -q tests/operators/test_inbox.py tests/operators/test_cli.py -k "phone or pictures"

matrix: $(VENV)/.ready-dev ## every version of Python, Celery and redis-py; ARGS="-l" goes to nox
	@$(PY) -m nox $(ARGS)

audit: $(VENV)/.ready-dev ## ask for known vulnerabilities of the dependencies; it needs the network
	@$(PY) -m nox -s audit

bench: $(VENV)/.ready-test ## what the guard costs, beside other guards, as ratios (minutes); ARGS="--docs"
	@$(PY) -m benchmarks $(ARGS)

bench-full: $(VENV)/.ready-test ## the same, then with up to a million records (an hour)
	@$(PY) -m benchmarks --full $(ARGS)

fuzz: $(VENV)/.ready-test ## 50,000 random pairs of calls: one key for each action (minutes); ARGS="--hypothesis-seed 7"
	@$(PY) -m pytest --hypothesis-profile fuzz --hypothesis-show-statistics --timeout 0 tests/proof/test_keys.py $(ARGS)

chaos: $(VENV)/.ready-test ## minutes of traffic while workers, store and brokers are broken; ARGS="--minutes 60 --seed 7"
	@$(PY) -m tests.chaos $(ARGS)

celery-suite: $(VENV)/.ready-test ## Celery's own tests with and without our task class; needs the network, ten minutes
	@$(PY) -m tests.compat.celery_suite $(ARGS)

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) .nox build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter is the file to look for: a folder alone may be half an environment.
$(PY):
	@$(PYTHON) -m venv $(VENV) || { echo "make: '$(PYTHON) -m venv' does not work here: on Debian and Ubuntu \
	install python3-venv, or name another interpreter: make PYTHON=…" >&2; exit 1; }

# One stamp for each extra; it is older than pyproject.toml when the dependencies have changed.
$(VENV)/.ready-%: pyproject.toml | $(PY)
	@echo "installing celery_idem[$*] into $(VENV) …"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
