# From nothing to a trained model: `make pretrain`. Every target makes what it needs first, once.

PYTHON ?= python3
VENV ?= .venv
STEPS ?= 300
OUTPUT ?= output/gpt_moe
ARGS ?=

# One rank per GPU where there are several; else four ranks share the CPU, so that there is something to exchange.
NUM_GPUS := $(shell scripts/num_gpus.sh)
RANKS ?= $(if $(filter-out 0 1,$(NUM_GPUS)),$(NUM_GPUS),4)
ACCELERATOR ?= $(if $(filter-out 0 1,$(NUM_GPUS)),cuda,cpu)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
COMPILED := $(VENV)/.compiled
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
# A file that is gone shows in its folder alone.
NATIVE_FOLDERS := $(shell find csrc -type d)
ZFP_SOURCES := $(wildcard zfp/src/* zfp/include/planmoe_zfp/*)
PYTHON_SOURCES := $(wildcard planmoe_ds tests examples benchmarks megatron_patches) setup.py

export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help install pretrain pretrain-megatron test check format clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "make pretrain STEPS=600 RANKS=2 ARGS='--planmoe off --data my.txt' OUTPUT=output/mine"

install: $(COMPILED) ## make .venv, install what is pinned, compile the extension

pretrain: $(COMPILED) ## train a small GPT-MoE for about a minute; again: continue or evaluate
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} DS_ACCELERATOR=$(ACCELERATOR) PATH="$(abspath $(BIN)):$$PATH" \
	    $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=$(RANKS) \
	    examples/gpt_moe/pretrain_deepspeed.py --steps $(STEPS) --output $(OUTPUT) $(ARGS)

pretrain-megatron: $(COMPILED) ## the same with megatron.core instead of DeepSpeed, and its option names
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(if $(filter cpu,$(ACCELERATOR)),CUDA_VISIBLE_DEVICES=) \
	    $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=$(RANKS) \
	    examples/gpt_moe/pretrain_megatron.py --train-iters $(STEPS) --save $(OUTPUT)_megatron $(ARGS)

test: $(COMPILED) $(INSTALLED_DEV) ## run the tests; ARGS='tests/unit -x' for some
	$(BIN)/python -m pytest $(ARGS)

check: $(COMPILED) $(INSTALLED_DEV) ## ruff, mypy and clang-format; changes nothing
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	cd examples/gpt_moe && MYPYPATH=../.. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml *.py
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

format: $(INSTALLED_DEV) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

clean: ## remove .venv and everything built; outputs of runs stay
	rm -rf $(VENV) build *.egg-info planmoe_ds/*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt scripts/bootstrap.sh
	scripts/bootstrap.sh requirements.txt
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	scripts/bootstrap.sh requirements-dev.txt
	@touch $@

# PLANMOE_CUDA=1|0 where it was something else, or nothing, when the extension was compiled
ifneq ($(PLANMOE_CUDA),)
CUDA_CHOICE := $(VENV)/.cuda-$(PLANMOE_CUDA)
$(CUDA_CHOICE): | $(INSTALLED)
	@rm -f $(VENV)/.cuda-*
	@touch $@
endif

$(COMPILED): $(INSTALLED) setup.py pyproject.toml $(NATIVE_SOURCES) $(NATIVE_FOLDERS) $(ZFP_SOURCES) $(CUDA_CHOICE)
	@echo "==> compiling planmoe_ds"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
