# make test: lint, types, tests.  make demo: both stages, from photographs to generated digits, in minutes.
# make bench-data: speed of loading and conversion, beside others'.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)

# make test-long: the tests that take a minute or more each.
# make test-processors: the tests as processors with fewer instructions, and a busy machine, would run them.
# make soak: kill runs at many moments and compare their ends.
# make bench: the training step beside the textbook's; memory, costs, start-up, scaling.
# make lock: resolve pyproject.toml again, to the newest releases that it admits.
.PHONY: test test-long test-processors soak bench bench-data demo env lock clean

test: env
	@ruff check --quiet . && ruff format --quiet --check .
	@mypy --no-error-summary
	@python -m pytest

test-long: env
	@python -m pytest -n 0 -m long

test-processors: env
	@python -m tests.processors

soak: env
	@python -m tests.soak

bench: env
	@python -m rae.plan.bench

demo: env
	@python -m rae demo

bench-data: env
	@python -m rae.plan.bench.data

env: $(VENV)/.ready

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "error: Python 3.11 to 3.13 is needed; set PYTHON=python3.12, say"; exit 2; }
	@echo "installing into $(VENV) (6 GB, a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV) || { echo "error: no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	@uv pip install --quiet --python $(VENV)/bin/python --compile-bytecode --no-deps -r requirements.txt -e .
	@touch $@

lock: env
	@uv pip compile --quiet --universal --upgrade --no-annotate --custom-compile-command 'make lock' --extra demo --extra dev --group composer \
		pyproject.toml -o requirements.txt

clean:
	@rm -rf $(VENV) runs data
