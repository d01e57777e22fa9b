# `make demo` and `make test` are all a newcomer needs; each installs what it uses.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
NAME ?=
# torch==2.13.0 comes through pip: a CPU build may be at hand locally where other installers do not look.
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# pip's one line a package, as a counter on one line.
COUNTED = | { n=0; while read -r word name _; do \
	[ "$$word" != Collecting ] || printf '\r  %3d packages  %-50.50s' $$((++n)) "$$name"; done; echo; }
DEMO = $${XDG_CACHE_HOME:-$$HOME/.cache}/pinrank/demo/latest
# So that a failed install fails its target, whatever counts its lines.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help demo test check bench bench-gpu gpu-wheels claims load proto clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   fill a feature store from MovieLens-1M, start the server, rank for real users (DATA=folder: your own)"
	@echo "make test   install everything and run every test"
	@echo "make check  format, lint, types, import rules"
	@echo "make bench  run the benchmarks (NAME=serving: one of them) and commit-ready results in bench/results/"
	@echo "make bench-gpu   measure the GPU engines and the fused kernel on this machine's GPU (GPU_PYTHON=python3)"
	@echo "make gpu-wheels  bring what bench-gpu uses into gpu-wheels/, to be carried to a machine without a network"
	@echo "make claims print every committed claim, and whether it holds"
	@echo "make load   load-test the running demo (ARGS='--rate 200 --duration 30')"

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/serving: $(BIN)/python pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.py)
	@echo "installing pinrank (about half a minute)"
	@$(PIP) -e '.[data]' $(COUNTED)
	@touch $@

.venv/everything: .venv/serving
	@echo "installing PyTorch and the development tools (about a minute)"
	@$(PIP) -e '.[data,train,dev]' $(COUNTED)
	@touch $@

demo: $(if $(wildcard $(DATA)),.venv/everything,.venv/serving)
	@$(BIN)/python deploy/demo/demo.py $(if $(DATA),--data "$(DATA)") $(ARGS)

test: .venv/everything
	$(BIN)/python -m pytest $(ARGS)

check: .venv/everything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/everything
	$(BIN)/python -m bench $(NAME) $(ARGS)

bench-gpu:
	@bench/gpu.sh $(ARGS)

# For another Python than this one: that of the machine with the GPU.
GPU_PYTHON_VERSION ?= 3.12
gpu-wheels: $(BIN)/python
	@echo "bringing wheels for Python $(GPU_PYTHON_VERSION) into gpu-wheels/"
	@$(BIN)/python -m pip download --disable-pip-version-check --progress-bar off --no-deps --dest gpu-wheels \
		--python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --only-binary :all: -r bench/gpu-carry.txt \
		mako markupsafe platformdirs pytools siphash24 $(COUNTED)
	@$(BIN)/python -m pip download --disable-pip-version-check --progress-bar off --no-deps --dest gpu-wheels \
		--no-binary pycuda pycuda $(COUNTED)
	@du -sh gpu-wheels

claims: .venv/everything
	@$(BIN)/python -m bench claims

load: .venv/serving
	@[ -e "$(DEMO)" ] || { echo 'no demo data yet: run `make demo` first, and leave it running'; exit 1; }
	@$(BIN)/pinrank load --users "$(DEMO)/users.json" --pins "$(DEMO)/pins.json" $(ARGS)

proto: .venv/everything
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. pinrank/v1/*.proto

clean:
	rm -rf .venv
