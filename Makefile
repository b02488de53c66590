# make demo    train a small LSTM on Python's own documentation and show what a memory gives it
# make test    the test suite
# make soak    a million tokens through one window, and kills at random moments: half an hour
# make fuzz    strangers' files for every parser: RUNS executions each (RUNS=100000), some minutes
# make results RESULTS.md from the run folders in results/
# make lint    style and types
# make setup   the environment alone (.venv); the others call it

PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
TORCH_INDEX ?=
RUNS ?= 100000
BIN := .venv/bin
INSTALLED := .venv/.installed-$(REQUIREMENTS)

.PHONY: demo test soak fuzz lint results setup clean

demo: setup
	$(BIN)/python train.py --config configs/demo.yaml --resume
	$(BIN)/python evaluate.py --config configs/demo.yaml --checkpoint runs/demo

test: setup
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

soak: setup
	$(BIN)/python benchmarks/soak.py --output runs/soak.json
	$(BIN)/python benchmarks/long_text.py --output runs/long_text.json
	MBPA_KILLS=50 $(BIN)/python -m pytest -k "stopped or killed" tests/test_faults.py tests/training tests/memory

fuzz: setup
	$(BIN)/python -m pip install --disable-pip-version-check --quiet atheris
	$(BIN)/python -m tests.fuzz --runs $(RUNS) --output runs/fuzz.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: setup
	$(BIN)/python -m mbpa_lm.results results --output RESULTS.md

setup: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) requirements-common.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "error: $(PYTHON) is Python %d.%d; name one of 3.11 to 3.13: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
