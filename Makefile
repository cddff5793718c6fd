# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Nothing is written outside this folder: the environment is .venv, everything else is under .belt.

PYTHON ?= python3
BIN := .venv/bin
STATE := $(CURDIR)/.belt

# Prefect's home and every cache stay in the checkout; nobody is told that belt runs.
export PREFECT_HOME := $(STATE)/prefect
export HF_HOME := $(STATE)/huggingface
export HF_HUB_OFFLINE := 1
export MPLCONFIGDIR := $(STATE)/matplotlib
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test contracts release-contracts bench bench-fine-tuning results s3 up down stack-status stack-env check format clean

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20

demo: .venv/demo  ## install, then run the whole pipeline on real text and say where its results are
	$(BIN)/belt demo --output .belt/demo

test: .venv/test check  ## install, then run the linters, the type checker and all tests that need no GPU
	mkdir -p $(PREFECT_HOME)
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
		$(BIN)/python -m pytest -n 3 --dist loadfile --max-worker-restart 0 --no-loadscope-reorder -m "not gpu"; \
	else \
		echo "No Chromium on this machine: the tests that look at reports in a browser (marker browser) are left out."; \
		$(BIN)/python -m pytest -n 3 --dist loadfile --max-worker-restart 0 --no-loadscope-reorder -m "not gpu and not browser"; \
	fi

contracts: .venv/test .venv-contracts/installed  ## install datacontract-cli apart, then test contracts and published tables with it
	rm -rf $(STATE)/contracts && mkdir -p $(STATE)/contracts
	$(BIN)/python -m tests.contracts.publish_sample $(STATE)/contracts
	.ci/contracts .venv-contracts/bin/datacontract $(STATE)/contracts

release-contracts: .venv/test  ## make the contracts in work the released ones, if their versions admit to what changed
	$(BIN)/python -m tests.contracts.release

bench: .venv/bench  ## install, then measure belt's scoring beside its peers; ARGS=--help lists the options
	$(BIN)/python -m tests.benchmarks.scoring $(ARGS)

results: .venv/demo  ## fine-tune on the real corpora in DATA=DIR, compare ways of reading, and put the results into the README
	$(BIN)/python -m tests.benchmarks.results $(DATA) --readme README.md $(ARGS)

bench-fine-tuning: .venv/bench  ## install, then measure a fine-tuning step beside other ways to its gradient; ARGS=--help
	$(BIN)/python -m tests.benchmarks.fine_tuning $(ARGS)

s3: .venv/test  ## install, then run an S3 server on this machine, to try belt with s3:// URLs
	$(BIN)/python -m tests.s3_server

up: .venv/stack  ## install, then start PostgreSQL, S3, Prefect and workers here, and deploy everything
	$(BIN)/python -m deployments.stack up

down: .venv/stack  ## stop what `make up` started; what it keeps stays
	$(BIN)/python -m deployments.stack down

stack-status: .venv/stack  ## say how the services of `make up` do
	$(BIN)/python -m deployments.stack status

stack-env: .venv/stack  ## print what a shell needs to speak with them; contains secrets
	@$(BIN)/python -m deployments.stack env

check: .venv/test  ## linters, type checker and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/test  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that the other commands made
	rm -rf .venv .venv-contracts .belt build belt_tasks/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "belt needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv .venv

# A stamp per extra: installed again only when the dependencies or the compiled kernels change.
.venv/%: .venv/bin/python pyproject.toml constraints.txt $(wildcard belt_tasks/*.c)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

# An environment of its own: belt's versions of typer and DuckDB are newer than datacontract-cli allows.
.venv-contracts/installed: .venv/bin/python .ci/contracts-constraints.txt
	rm -rf .venv-contracts
	$(PYTHON) -m venv .venv-contracts
	.venv-contracts/bin/python -m pip install --quiet --constraint .ci/contracts-constraints.txt 'datacontract-cli[duckdb]'
	@touch $@
