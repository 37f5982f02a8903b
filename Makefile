# The same words locally and in CI. Python 3.11 or later and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?=
OUT ?= runs/demo
ENVIRONMENT ?= $(VENV)
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo rehearsal check test test-federation test-bench chaos fuzz bench build sbom clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## install   set up .venv with fedgex and every tool
install: $(READY)

$(READY): pyproject.toml setup.py deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt 'pip>=25.1' torch
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt --editable '.[simulation,flower-engine]' --group dev
	@touch $@

## demo      run a whole federation and its report; DATA=FOLDER takes the real data
demo: install
ifeq ($(DATA),)
	$(BIN)/fedgex-sim new-data runs/demo-data
	$(BIN)/fedgex-sim run demo --data runs/demo-data --out $(OUT)
else
	$(BIN)/fedgex-sim run release --data $(DATA) --out $(if $(filter runs/demo,$(OUT)),runs/release,$(OUT))
endif

## rehearsal a consortium of four sites on this machine, with real processes; DATA=FOLDER
rehearsal: install
	rm -rf runs/rehearsal
	$(BIN)/fedgex-sim rehearse $(if $(DATA),--data $(DATA)) --out runs/rehearsal

## check     formatting, lint, strict types, import contracts, deploy/
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	deploy/check.sh $(BIN)

## test      all that is quick; those on real data need FEDGEX_DATA (../shared/data)
test: install
	$(BIN)/pytest -rs --numprocesses 2 --dist loadfile -m 'not slow and not deployment and not chaos'

## test-federation  failures between hospitals, with real processes, and two of chaos
test-federation: install
	FEDGEX_CHAOS=$${FEDGEX_CHAOS:-2} $(BIN)/pytest -rs --numprocesses 2 tests/processes

## test-bench  that the quick bench runs; some five minutes
test-bench: install
	$(BIN)/pytest -rs -m slow

## chaos     kill at every named fail-point, on both sides; FEDGEX_CHAOS=N tries N of them
chaos: install
	FEDGEX_CHAOS=$${FEDGEX_CHAOS:-all} $(BIN)/pytest -rs -m chaos

## fuzz      try each parser that faces another party; FEDGEX_FUZZ=N inputs for each
fuzz: install
	FEDGEX_FUZZ=$${FEDGEX_FUZZ:-10000} $(BIN)/pytest -q -s tests/fuzz

## bench     throughput, overhead, memory and cost, as ratios of one run
bench: install
	$(BIN)/python -m tests.performance

## build     wheel and source distribution in dist/
build: install
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

## sbom      what is installed, as CycloneDX in dist/sbom.json; ENVIRONMENT=/opt/fedgex
sbom: install
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file dist/sbom.json $(ENVIRONMENT)/bin/python

## clean     remove everything that make has made
clean:
	rm -rf $(VENV) build dist *.egg-info runs
