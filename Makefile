# Two commands on a fresh machine with Python >= 3.12: `make demo` and `make test`.
# PYTHON=/path/to/python names the interpreter that creates the environment.

VENV := .venv
RUN := $(VENV)/bin
# Compilation fills the time of the tests: a few processes, each keeping its compiled functions.
# One that crashes ends the run: under loadfile, xdist 3.8 never gives work to the one in its place.
PYTEST_FLAGS := -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.PHONY: demo test lint types check clean

demo: $(VENV)/installed
	$(RUN)/python -m qserve_jax.generate --prompt "Once upon a time"

test: $(VENV)/installed-dev
	$(RUN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/installed-dev
	$(RUN)/ruff check
	$(RUN)/lint-imports --no-cache

types: $(VENV)/installed-dev
	$(RUN)/pyright --pythonpath $(RUN)/python

check: test lint types

clean:
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info

# Stamps: the environment is installed again only when its description changes.
$(VENV)/installed: pyproject.toml scripts/setup_env.sh
	@scripts/setup_env.sh $(VENV)
	@touch $@

$(VENV)/installed-dev: pyproject.toml scripts/setup_env.sh
	@scripts/setup_env.sh $(VENV) dev
	@touch $@ $(VENV)/installed
