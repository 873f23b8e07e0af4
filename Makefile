# Everything here works on a fresh clone: the first target that needs it makes .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SEEDS  ?= 0,1,2
RUNS   ?= runs

.DEFAULT_GOAL := help
.PHONY: help setup demo dashboard test coverage test-slow test-gpu lint format bench bench-speed wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY)  ## make .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and f"eit_lab needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned versions of constraints.txt into $(VENV) (about two minutes)"
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## ViT, LSRA and EIT on real images, three seeds each: table and figure, minutes on 2 cores
	$(BIN)/python -m eit_lab.train -m experiment=demo seed=$(SEEDS)

dashboard: $(READY)  ## a local web view of the runs in RUNS=runs, no account: TensorBoard on 127.0.0.1
	$(BIN)/python -m eit_lab.dashboard view $(RUNS)

test: $(READY)  ## the tests: no network, no GPU, under 5 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

coverage: $(READY)  ## the same tests, and which lines and branches they reach; tracing doubles their time
	@rm -f .coverage*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term

test-slow: $(READY)  ## the tests that take minutes, a quarter of an hour in all; Slurm, jpegtran and Chromium where they are
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(READY)  ## style, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## timings, side by side; records go under benchmarks/records/
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/pieces.py
	$(BIN)/python benchmarks/wandb_faults.py --train
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python -m eit_lab.bench data out=benchmarks/records

bench-speed: $(READY)  ## a step, a forward pass, the start and a profile, on the GPU or the CPU; docs/performance.md anew
	$(BIN)/python -m eit_lab.bench step out=benchmarks/records
	$(BIN)/python -m eit_lab.bench model out=benchmarks/records
	$(BIN)/python -m eit_lab.bench startup out=benchmarks/records
	$(BIN)/python -m eit_lab.bench profile out=benchmarks/records
	$(BIN)/python -m eit_lab.bench page

wheel: $(READY)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## remove what the targets made, runs excepted
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
