# Every target that runs something first makes .venv with the extras it needs; anew when setup.py or constraints.txt
# change.
PYTHON ?= python3
VENV := .venv
N ?= 200000
SEED ?= 0
# Processes of `make test`, each with one thread (tests/conftest.py).
WORKERS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would race
.PHONY: help demo test test-peers test-slow faults fuzz-numerics fuzz-doors bench bench-full bench-compare accuracy gpu gpu-counts kernels numerics lint format venv clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo ## fine-tune experts on real data, merge them, print the table (demo-out/)
	$(BIN)/isomerge demo --out demo-out

# The script and not `python -m pytest`, which would put the checkout on sys.path, and with it a namespace package named
# `kernels`.
test: $(VENV)/.installed-test ## run the test suite, on two cores: make test WORKERS=4
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-peers: $(VENV)/.installed-peers ## run what is tested inside and beside mergekit, FusionBench, PEFT and Ray
	ISOMERGE_REQUIRE_PEERS=1 $(BIN)/pytest -m 'peer and not long'

test-slow: $(VENV)/.installed-test ## run only the tests marked slow, and those that `make test` leaves out
	$(BIN)/pytest -m 'slow or long'

faults: $(VENV)/.installed-test ## kills, pairs without locks, failing disks and fuzzed inputs (about 40 minutes on one core)
	$(BIN)/python tests/support/fault_driver.py --points 10000
	$(BIN)/python tests/support/fault_pairs.py --pairs 100
	$(BIN)/python tests/support/fault_disk.py --rounds 100
	$(BIN)/python tests/support/fault_fuzz.py --inputs 100000

# One thread: the matrices are small.
fuzz-numerics: $(VENV)/.installed-test ## 10,000 random merges of 500 families and more against the oracle (3 minutes on one core)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/support/fuzz_numerics.py

fuzz-doors: $(VENV)/.installed-test ## every verb and public function with wrong types and damaged files: make fuzz-doors N=200000 SEED=0
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/support/fuzz_doors.py --draws $(N) --seed $(SEED)

bench: $(VENV)/.installed-bench ## time and error beside numpy, torch, FusionBench, mergekit (under 10 minutes on 2 cores)
	$(BIN)/python -m benchmarks.run

bench-full: $(VENV)/.installed-bench ## the same with larger shapes, and more of them (long)
	$(BIN)/python -m benchmarks.run --level full --minutes 120

bench-compare: $(VENV)/.installed-bench ## what became slower or less exact: make bench-compare OLD=a.json NEW=b.json
	$(BIN)/python -m benchmarks.compare $(OLD) $(NEW)

accuracy: $(VENV)/.installed-demo ## experts on real tasks, merged by every method, over seeds and base strengths
	$(BIN)/python -m benchmarks.accuracy

gpu: ## prove and measure everything on this machine's GPU (12 minutes; the python on PATH; docs/gpu.md)
	$(PYTHON) -m benchmarks.gpu

gpu-counts: $(VENV)/.installed-test ## count what merges ask of a GPU, on this CPU, and write the table of docs/gpu.md anew
	PYTHONPATH=tests/support $(BIN)/python -m benchmarks.gpu.counts --write docs/gpu.md

kernels: $(VENV)/.installed-test ## compile every kernel for every target and write the table of docs/kernels.md anew
	$(BIN)/python -m benchmarks.compile_table --write docs/kernels.md

numerics: $(VENV)/.installed-test ## measure the error tables of docs/numerics.md anew
	$(BIN)/python tests/support/error_table.py --write docs/numerics.md

lint: $(VENV)/.installed-dev ## ruff, pyright and the floors, nothing rewritten
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(VENV)/.installed-dev ## the environment for development: test and dev extras, and the peers

clean: ## remove build products, caches and the demo's output; .venv stays
	rm -rf build dist demo-out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-test: EXTRAS := test
$(VENV)/.installed-peers: EXTRAS := test,mergekit,fusion-bench,peft,ray
# The linters look at what is written for the peers too.
$(VENV)/.installed-dev: EXTRAS := dev,test,mergekit,fusion-bench,peft,ray
$(VENV)/.installed-bench: EXTRAS := bench,fusion-bench,mergekit

$(VENV)/.installed-%: setup.py constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# bin/pip is what venv writes last: an environment that was cut short is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "isomerge-fast needs Python 3.11 or newer, and '$(PYTHON)' is not that:" >&2; \
		$(PYTHON) --version >&2; \
		echo "Name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks the modules venv and ensurepip, which make $(VENV)." >&2; \
		echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
