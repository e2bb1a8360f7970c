# Each target does all its own set-up on a bare machine: a virtual environment with pinned dependencies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PEERS := $(VENV)/peers

.PHONY: demo test test-slow test-faults smoke bench-mixers lint teacher teacher-scores clean
demo: $(STAMP)  ## the main job end to end, on the embedded teacher
	$(BIN)/distill run demo

test: $(STAMP)  ## lint, types, tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take half a minute and more each
	$(BIN)/python -m pytest -m slow --ignore tests/faults

test-faults: $(STAMP)  ## kill -9 at 60 random moments, damaged checkpoints, a full disk (13 minutes on 2 cores)
	$(BIN)/python -m pytest -m slow -s tests/faults

smoke: $(STAMP)  ## the demo cut short: the same chain, a few steps each
	$(BIN)/distill run smoke

bench-mixers: $(PEERS)  ## the mixers beside mamba-ssm's reference, transformers' slow path and attention (some ten minutes)
	PEERS=$(PEERS) $(BIN)/python benchmarks/mixers.py --plot docs/mixers.png

lint: $(STAMP)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/mypy

teacher: $(STAMP)  ## train the embedded teacher again, both phases, and put it in place (about two hours on 2 cores)
	$(BIN)/distill pretrain teacher output=runs/teacher
	$(BIN)/distill pretrain teacher_polish start=runs/teacher output=runs/teacher_polish
	find runs/teacher_polish -maxdepth 1 -type f -exec install -m 644 {} distill/data/teacher/ \;
	install -m 644 runs/teacher/recipe.yaml distill/data/teacher/recipe_1.yaml
	install -m 644 runs/teacher/log.jsonl distill/data/teacher/log_1.jsonl

teacher-scores: $(STAMP)  ## score the shipped teacher on the held-out suites again, without training
	rm -f distill/data/teacher/scores.json
	$(BIN)/distill pretrain teacher_polish output=distill/data/teacher

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(PEERS): $(STAMP)  ## sources to measure against, beside the environment and not in it: nothing is compiled
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet --no-deps \
		--no-build-isolation --target $@ mamba-ssm==2.3.2.post1 einops==0.8.1

clean:
	rm -rf $(VENV) build dist *.egg-info
