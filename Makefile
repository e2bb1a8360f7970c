# Each target does all its own set-up on a bare machine: a virtual environment with pinned dependencies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PEERS := $(VENV)/peers
LIGER := $(VENV)/liger
DEEPSPEED := $(VENV)/deepspeed
GGUF := $(VENV)/gguf

.PHONY: demo test test-slow test-faults test-transformers test-deepspeed test-gguf test-slurm smoke bench-mixers bench-distill bench-importance lint teacher teacher-scores clean
demo: $(STAMP)  ## the main job end to end, on the embedded teacher
	$(BIN)/distill run demo

test: $(STAMP)  ## lint, types, tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)  ## the tests that take half a minute and more each
	$(BIN)/python -m pytest -m slow --ignore tests/faults

test-faults: $(STAMP)  ## kill -9 at 60 random moments, damaged checkpoints, a full disk (13 to 17 minutes on 2 cores)
	$(BIN)/python -m pytest -m slow -s tests/faults

UPSTREAM := build/transformers
# A checkout of transformers of the same version, whose checks of generation and caches are then run too:
TRANSFORMERS_TESTS ?=
test-transformers: $(UPSTREAM)/ready  ## transformers' own checks of models, on tiny hybrids of every family and mixer
	TRANSFORMERS_TESTS=$(UPSTREAM)/tests:$(if $(TRANSFORMERS_TESTS),$(TRANSFORMERS_TESTS)/tests) \
	PYTHONPATH=$(UPSTREAM)/site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -W ignore -rf --junitxml $(UPSTREAM)/results.xml tests/upstream/checks.py; \
	status=$$?; $(BIN)/python tests/upstream/report.py $(UPSTREAM)/results.xml | tee $(UPSTREAM)/report.md; exit $$status

# Their checks of models are in their source distribution, those of generation only in their repository.
$(UPSTREAM)/ready: $(STAMP)
	rm -rf $(UPSTREAM) && mkdir -p $(UPSTREAM)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --constraint constraints.txt \
		--dest $(UPSTREAM) transformers
	tar -xzf $(UPSTREAM)/transformers-*.tar.gz -C $(UPSTREAM) --strip-components 1
	touch $(UPSTREAM)/tests/__init__.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target $(UPSTREAM)/site \
		parameterized==0.9.0 httpx==0.28.1
	touch $@

test-deepspeed: $(DEEPSPEED)/installed  ## hybrids under DeepSpeed, two ranks on this CPU (installs it beside the rest)
	$(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/ecosystem/test_deepspeed.py tests/distributed \
		tests/test_global_batch.py

test-gguf: $(GGUF)/installed  ## hybrids in llama.cpp: logits, text, tokenizers (compiles it the first time)
	OMP_NUM_THREADS=1 $(GGUF)/bin/python -m pytest -m gguf tests/export tests/stages/test_gguf_files.py

test-slurm: $(STAMP)  ## a run through a real Slurm on this machine's loopback, set up and stopped again (root, Debian)
	$(BIN)/python -m pytest -m slurm tests/slurm

smoke: $(STAMP)  ## the demo cut short: the same chain, a few steps each
	$(BIN)/distill run smoke

bench-mixers: $(PEERS)  ## the mixers beside mamba-ssm's reference, transformers' slow path and attention (some ten minutes)
	PEERS=$(PEERS) $(BIN)/python benchmarks/mixers.py --plot docs/mixers.png

bench-distill: $(LIGER)  ## a step of distillation beside TRL, Liger and the plain loss (some minutes; 20 GB of memory)
	LIGER=$(LIGER) $(BIN)/python benchmarks/distill_step.py

bench-importance: $(STAMP)  ## the cheap importance scores beside the faithful ones, at 8, 16 and 32 blocks (some twenty minutes)
	$(BIN)/python benchmarks/importance.py

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

# an environment of its own on top of the other: every process that trains would import DeepSpeed where it is found
$(DEEPSPEED)/installed: $(STAMP)
	$(BIN)/python -m venv $(DEEPSPEED)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(DEEPSPEED)/bin/python -c "import site; print(site.getsitepackages()[0])")/below.pth
	$(DEEPSPEED)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed]"
	touch $@

# llama.cpp has no wheel on PyPI. GGML_NATIVE=OFF: on CPUs with AMX its kernels for quantised models crash. So what the
# CPU has is asked for by name; tools, examples and the library that only they use are left out.
CPU_FLAGS = $(shell for flag in avx avx2 fma f16c bmi2; do \
	if grep -qw $$flag /proc/cpuinfo 2> /dev/null; then echo "-DGGML_$$flag=ON" | tr a-z A-Z; fi; done)
LLAMA_CPP := -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DGGML_CCACHE=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/$(GGUF)/lean.cmake
$(GGUF)/installed: $(STAMP)
	command -v c++ > /dev/null || (apt-get update --quiet && apt-get install --quiet --yes g++)
	$(BIN)/python -m venv $(GGUF)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(GGUF)/bin/python -c "import site; print(site.getsitepackages()[0])")/below.pth
	echo 'set(LLAMA_BUILD_COMMON OFF)' > $(GGUF)/lean.cmake
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS="$(LLAMA_CPP) $(CPU_FLAGS)" $(GGUF)/bin/python -m pip install \
		--quiet --constraint constraints.txt --editable ".[gguf]"
	touch $@

$(PEERS): $(STAMP)  ## sources to measure against, beside the environment and not in it: nothing is compiled
	rm -rf $@
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet --no-deps \
		--no-build-isolation --target $@ mamba-ssm==2.3.2.post1 einops==0.8.2
	touch $@

$(LIGER): $(STAMP)  ## as above: its chunked losses are plain PyTorch
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ liger-kernel==0.8.5
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
