# The whole pipeline: `make extract train` runs the demo; CONFIG=my.yaml runs your own data.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$p -c 'import sys; (3, 11) <= sys.version_info < (3, 15) and print("$p")' 2>/dev/null)) python3)
CONFIG ?= configs/demo.yaml
EXTRA  ?= $(if $(GPU),cuda12)
TORCH  ?= torch==2.13.0
comma  := ,
BIN     = .venv/bin
MINSAE  = $(BIN)/python -m minsae_jax
SETUP   = .venv/.installed$(if $(EXTRA),-$(EXTRA))
# Only the slow tests need Braindecode, which takes a minute to install.
BRAINDECODE = .venv/.installed-braindecode

# JAX for CUDA only, without torch: nothing else uses this environment.
CUDA = .venv-cuda

# Inputs of the demo. Any other CONFIG names its own recordings and encoder.
CHECKPOINT ?= configs/demo/encoder.pth
CHECKPOINT_YAML ?= $(if $(filter configs/demo/encoder.pth,$(CHECKPOINT)),configs/demo/encoder.yaml)
ENCODER ?= checkpoints/demo
DEMO_DATA = data/demo/tuhab_preprocessed/file_lengths_map.csv
EDF_DATA = data/edf/source/demo.yaml
INPUTS = $(if $(filter configs/demo.yaml,$(CONFIG)),$(DEMO_DATA)) \
	$(if $(filter configs/demo.yaml configs/edf.yaml,$(CONFIG)),$(ENCODER)/config.json)

# One pytest worker per core; a worker that runs out of tests takes some of another's. Bytecode is
# written in any environment, since all workers and commands of the tests import the same modules.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help setup demo prepare convert extract train evaluate tensorboard test test-all check bench bench-train bench-stream bench-extract bench-gpu cuda-check clean
.DEFAULT_GOAL := help
.NOTPARALLEL: # train reads the store that extract writes

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 22
	@echo; echo "  CONFIG=my.yaml runs extract, train and evaluate on your own data; GPU=1 installs JAX for CUDA."

setup: $(SETUP) ## create .venv and install the project in it (GPU=1, or EXTRA=cuda12 or cuda13, for CUDA)

$(SETUP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 15) else f"minsae_jax requires Python 3.11 to 3.14, got {v[0]}.{v[1]}; choose another with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[torch,dev$(if $(EXTRA),$(comma)$(EXTRA))]"
	@touch $@

demo: $(DEMO_DATA) ## write the demo's recordings

# If the YAML is newer, `demo` compares its settings with those of the recordings.
$(DEMO_DATA): configs/demo.yaml | $(SETUP)
	@$(MINSAE) demo --config configs/demo.yaml

prepare: $(SETUP) $(if $(filter configs/edf.yaml,$(CONFIG)),$(EDF_DATA)) ## convert EEG files into recordings (CONFIG=configs/edf.yaml for a demo)
	@$(MINSAE) prepare --config $(CONFIG)

$(EDF_DATA): configs/edf.yaml | $(SETUP)
	@$(MINSAE) demo --config configs/edf.yaml

convert: $(ENCODER)/config.json ## convert a PyTorch encoder (CHECKPOINT=x.pth CHECKPOINT_YAML=x.yaml ENCODER=folder)

$(ENCODER)/config.json: $(CHECKPOINT) $(CHECKPOINT_YAML) | $(SETUP)
	@$(BIN)/python -m convert encoder $(CHECKPOINT) $(if $(CHECKPOINT_YAML),--config_path $(CHECKPOINT_YAML)) --out $(ENCODER)

extract: $(SETUP) $(INPUTS) ## write the encoder's activations for train, val and test patients
	@$(MINSAE) extract --config $(CONFIG)

train: $(SETUP) ## train the sweep on the stored activations
	@$(MINSAE) train --config $(CONFIG)

evaluate: $(SETUP) ## measure the sweep on test patients, recommend a member, and write the report
	@$(MINSAE) evaluate --config $(CONFIG)

tensorboard: $(SETUP) ## show all runs at http://localhost:6006
	@$(BIN)/tensorboard --logdir runs

test: $(SETUP) ## run the quick tests
	@$(PYTEST) -m "not slow"

test-all: $(BRAINDECODE) ## run all tests, as CI does
	@$(PYTEST)

$(BRAINDECODE): pyproject.toml | $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[braindecode]"
	@# The torchaudio that comes along needs CUDA; beside a torch for CPUs it breaks transformers.
	@$(BIN)/python -c 'import torchaudio' 2> /dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchaudio
	@touch $@

check: $(SETUP) ## format, lint and types
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/biome lint --diagnostic-level=warn --error-on-warnings --skip=noRedundantUseStrict --skip=noUnusedVariables minsae_jax/report/assets/*.js

bench: bench-train bench-stream bench-extract ## measure training and extraction on this machine

bench-train: $(SETUP) ## measure training against PyTorch, and the kinds against ReLU
	@$(BIN)/python -m benchmarks.train
	@$(BIN)/python -m benchmarks.kinds

bench-stream: $(SETUP) ## measure how fast a store is read, and how well it is shuffled
	@$(BIN)/python -m benchmarks.stream

bench-extract: $(SETUP) ## measure extraction against PyTorch
	@$(BIN)/python -m benchmarks.extract

bench-gpu: $(SETUP) ## measure everything on a GPU, within 12 minutes (GPU=1; appends to runs/bench-gpu.md)
	@$(BIN)/python -m benchmarks.gpu --out runs/bench-gpu.md

cuda-check: $(CUDA)/.installed ## compile all GPU programs without a GPU (installs 6 GB in .venv-cuda)
	@$(CUDA)/bin/python -m benchmarks.cuda_check

$(CUDA)/.installed: pyproject.toml
	@test -x $(CUDA)/bin/python || $(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cuda12]"
	@touch $@

clean: ## remove the demo's files and all caches (stores in embeddings/ stay: they may be yours)
	rm -rf data/demo data/edf checkpoints/demo runs/demo runs/edf .pytest_cache .mypy_cache .ruff_cache .jax_cache
