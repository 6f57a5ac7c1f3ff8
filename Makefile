# Every target sets up what it needs in .venv; nothing has to be done before.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: help quickstart test check format clean

help:
	@echo "make quickstart   a teacher, served over HTTP, distils a student: 6 minutes on 2 cores"
	@echo "make test         all tests"
	@echo "make check        lint, format and types"
	@echo "make clean        remove .venv, runs and caches"

# torch alone and first: an exact version takes a CPU build from a wheel folder where pip has one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[teacher,trainer,dev]'
	touch .venv/ready

quickstart: .venv/ready
	$(BIN)/python -m examples.mini_humaneval.quickstart --output_dir runs/quickstart

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
