# make test: lint, types, tests.  make demo: train an autoencoder on photographs, in minutes.
# make bench-data: speed of loading and conversion, beside others'.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)

# make test-long: the tests that take a minute or more each.
# make soak: kill runs at many moments and compare their ends.
# make bench: the training step beside the textbook's; memory, costs, start-up, scaling.
.PHONY: test test-long soak bench bench-data demo env clean

test: env
	@ruff check --quiet . && ruff format --quiet --check .
	@mypy --no-error-summary
	@python -m pytest

test-long: env
	@python -m pytest -n 0 -m long

soak: env
	@python -m tests.soak

bench: env
	@python -m rae.bench

demo: env
	@python -m rae demo

bench-data: env
	@python -m rae.bench.data

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
		|| { echo "error: Python 3.10 to 3.12 is needed; set PYTHON=python3.11, say"; exit 2; }
	@echo "installing into $(VENV) (6 GB, a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	@python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@# diffusers and streaming cannot share an environment: they want transformers from 5 on and below 5 (and diffusers 0.42
	@# builds SigLIP with no transformers after 5.3). The tests run it as a process of its own, with this folder and our torch.
	@# It asks for Python 3.11 or later: on 3.10 those tests are skipped.
	@rm -rf $(VENV)/diffusers
	@python -m pip install --quiet --disable-pip-version-check --target $(VENV)/diffusers \
		'diffusers>=0.42,<0.43; python_version >= "3.11"' 'transformers>=5.3,<5.4; python_version >= "3.11"'
	@touch $@

clean:
	@rm -rf $(VENV) runs data
