# `make demo` and `make test` are all a newcomer needs; each installs what it uses.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
NAME ?=
# Which PyTorch `make test` installs: cpu (0.2 GB, from pytorch.org), pypi (2.7 GB, with CUDA), none (its tests are skipped), or
# auto: pypi beside an NVIDIA driver, else cpu, and none where pytorch.org cannot be reached. docs/install.md has the costs.
TORCH ?= auto
TRAINING := .venv/training-$(TORCH)
EVERYTHING := .venv/everything-$(TORCH)
# How many tests run side by side: three keep two cores busy, as a test waits a third of its time. 0: one after the other.
WORKERS ?= 3
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# pip's one line a package, as a counter on one line.
COUNTED = | { n=0; while read -r word name _; do \
	[ "$$word" != Collecting ] || printf '\r  %3d packages  %-50.50s' $$((++n)) "$$name"; done; echo; }
# The demo server that `make load` sends to; the link is there while it is up, and leads to the ids of its data.
PORT ?= 50051
SERVED = $${XDG_CACHE_HOME:-$$HOME/.cache}/pinrank/demo/serving-$(PORT)
# So that a failed install fails its target, whatever counts its lines.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help demo test check mutants resolve wheel bench gpu-wheels claims load proto clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   fill a feature store from MovieLens-1M, start the server, rank for real users (DATA=folder: your own)"
	@echo "make test   install everything and run every test (TORCH=cpu, pypi or none: which PyTorch; ARGS=tests/server)"
	@echo "make check  format, lint, types, import rules"
	@echo "make mutants  plant small faults in the pure files and count those that their tests notice (about 5 minutes)"
	@echo "make resolve  resolve every set of extras from the package index's metadata, with pip and uv, for each Python"
	@echo "make wheel  build the wheel and run the demo from it on each Python"
	@echo "make bench  run the benchmarks (NAME=serving: one of them) and commit-ready results in bench/results/"
	@echo "make gpu-wheels  bring what bench/gpu-ten-minutes.sh uses into gpu-wheels/, for a machine with a GPU and no network"
	@echo "make claims print every committed claim, and whether it holds"
	@echo "make load   load-test the running demo (PORT=50051, ARGS='--rate 200 --duration 30')"

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/serving: $(BIN)/python pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.py)
	@echo "installing pinrank (about half a minute)"
	@$(PIP) -e '.[data]' $(COUNTED)
	@touch $@

# The stamp says whether it is with PyTorch.
$(TRAINING): .venv/serving deploy/install/torch.sh
	@echo "installing PyTorch (about a minute)"
	@rm -f .venv/training-*
	@torch=$$(deploy/install/torch.sh $(TORCH) $(PIP) | tail -n 1) && echo $$torch > $@.part
	@[ "$$(cat $@.part)" = without ] || $(PIP) -e '.[data,train]' $(COUNTED)
	@mv $@.part $@

$(EVERYTHING): $(TRAINING)
	@echo "installing the development tools (about a minute)"
	@rm -f .venv/everything-*
	@$(PIP) -e ".[data,$$([ "$$(cat $(TRAINING))" = without ] || echo train,)dev]" $(COUNTED)
	@touch $@

demo: $(if $(wildcard $(DATA)),$(TRAINING),.venv/serving)
	@$(BIN)/python -m deploy.demo.demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(EVERYTHING)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

resolve: $(EVERYTHING)
	$(BIN)/python -m deploy.install.resolve

wheel: $(EVERYTHING)
	$(BIN)/python -m deploy.install.wheel

check: $(EVERYTHING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: $(EVERYTHING)
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(EVERYTHING)
	$(BIN)/python -m bench $(NAME) $(ARGS)

# For another Python than this one: that of the machine with the GPU. The folder is what is carried, so what was there goes.
GPU_PYTHON_VERSION ?= 3.12
gpu-wheels: $(BIN)/python
	@echo "bringing wheels for Python $(GPU_PYTHON_VERSION) into gpu-wheels/"
	@rm -rf gpu-wheels
	@$(BIN)/python -m pip download --disable-pip-version-check --progress-bar off --no-deps --dest gpu-wheels \
		--python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --only-binary :all: -c constraints.txt -r bench/gpu-carry.txt $(COUNTED)
	@$(BIN)/python -m bench.gpu.carried

claims: $(EVERYTHING)
	@$(BIN)/python -m bench claims

load: .venv/serving
	@[ -e "$(SERVED)" ] || { echo 'no demo serves on port $(PORT): run `make demo` first, and leave it running (PORT=...: another port)'; exit 1; }
	@$(BIN)/pinrank load --address 127.0.0.1:$(PORT) --users "$(SERVED)/users.json" --pins "$(SERVED)/pins.json" $(ARGS)

proto: $(EVERYTHING)
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. pinrank/v1/*.proto

clean:
	rm -rf .venv
