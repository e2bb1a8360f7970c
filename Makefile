# Each target does all its own set-up on a bare machine: a virtual environment with pinned dependencies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-slow smoke lint teacher clean
demo: $(STAMP)  ## the main job end to end, on the embedded teacher
	$(BIN)/distill run demo

test: $(STAMP)  ## lint, types, tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take half a minute and more each
	$(BIN)/python -m pytest -m slow

smoke: $(STAMP)  ## the demo cut short: the same chain, a few steps each
	$(BIN)/distill run smoke

lint: $(STAMP)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/mypy

teacher: $(STAMP)  ## train the embedded teacher again, both phases, and put it in place (about two hours on 2 cores)
	$(BIN)/distill pretrain teacher output=runs/teacher
	$(BIN)/distill pretrain teacher_polish start=runs/teacher output=runs/teacher_polish
	for part in model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja scores.json; do \
		install -m 644 runs/teacher_polish/$$part distill/data/teacher/; done
	for part in recipe.yaml:recipe_1.yaml log.jsonl:log_1.jsonl; do install -m 644 runs/teacher/$${part%:*} distill/data/teacher/$${part#*:}; done
	for part in recipe.yaml:recipe_2.yaml log.jsonl:log_2.jsonl; do install -m 644 runs/teacher_polish/$${part%:*} distill/data/teacher/$${part#*:}; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
