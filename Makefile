# `make run` and `make test` each work alone in a fresh clone: they make .venv and install what they
# need, and do so again only when pyproject.toml is newer than the last complete install.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.DELETE_ON_ERROR:
.PHONY: run install test lowest sabotage lint format board coverage clean

run: $(VENV)/.installed
	$(BIN)/mibench run --defense privdfs --attack diffusion

install: $(VENV)/.installed

# One process per core; the tests of a file stay together, since they share what they have trained.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

# The same with the lowest versions that pyproject.toml allows, in .venv-lowest; several GB.
lowest:
	.ci/lowest

# Every sabotaged component through its whole battery, and every honest one.
sabotage: $(VENV)/.installed-dev
	$(BIN)/python tests/sabotage/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The leaderboard's pages from their records, and whether they are what lies in git.
board: $(VENV)/.installed
	$(BIN)/mibench board build
	$(BIN)/mibench board check

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term-missing

clean:
	rm -rf $(VENV) .venv-lowest build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp goes before its install begins and comes back as the last act, so that a stamp always
# stands for a complete install. An environment without a working pip is one that was interrupted.
define environment
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("mibench needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@rm -f $(VENV)/.installed $(VENV)/.installed-dev
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef

$(VENV)/.installed: pyproject.toml
	$(environment)
	$(PIP) install -e .
	@touch $@

# An install for development serves `make run` as well.
$(VENV)/.installed-dev: pyproject.toml
	$(environment)
	$(PIP) install -e ".[dev]"
	@touch $(VENV)/.installed $@
