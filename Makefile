# The same words locally and in CI. Python 3.11 or later and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?=
OUT ?= runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo check test bench build clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## install   set up .venv with fedgex and every tool
install: $(READY)

$(READY): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt 'pip>=25.1' torch
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt --editable '.[simulation]' --group dev
	@touch $@

## demo      run a whole federation and its report; DATA=FOLDER takes the real data
demo: install
ifeq ($(DATA),)
	$(BIN)/fedgex-sim new-data runs/demo-data
	$(BIN)/fedgex-sim run demo --data runs/demo-data --out $(OUT)
else
	$(BIN)/fedgex-sim run tcga --data $(DATA) --out $(if $(filter runs/demo,$(OUT)),runs/tcga,$(OUT))
endif

## check     formatting, lint, strict types, import contracts
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## test      every test; those on real data need FEDGEX_DATA (../shared/data)
test: install
	$(BIN)/pytest -rs --numprocesses 2 --dist loadfile -m 'not federation'
	$(BIN)/pytest -rs -m federation  # one at a time: two Ray clusters starting at once can hang

## bench     throughput, overhead, memory and cost, as ratios of one run
bench: install
	$(BIN)/fedgex-sim bench

## build     wheel and source distribution in dist/
build: install
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

## clean     remove everything that make has made
clean:
	rm -rf $(VENV) build dist *.egg-info runs
