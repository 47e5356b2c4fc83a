# Every target works from a fresh clone with python3 (3.11 or newer, with venv), make and pip's package sources, and
# installs nothing outside this folder. PYTHON=python3.12 selects another Python, TORCH=<requirement or wheel> a torch.
.DEFAULT_GOAL := help
.PHONY: help install serve bench bench-peers test test-all test-clients chaos test-gpu gpu-wheels lint clean
# A recipe that fails must not leave its stamp file.
.DELETE_ON_ERROR:

PYTHON ?= python3
CHECKPOINT_PATH ?= image/demo/model
TOKENIZER_PATH ?= $(CHECKPOINT_PATH)
# Two ranks by default, to show tensor parallelism; one on a machine with a single GPU.
TP_SIZE ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')),1,2)
PORT ?= $(or $(START_PORT),10000)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PEERS := build/bench/peers/bin/python
# All modules: with PYTHONDONTWRITEBYTECODE every start would compile them again. On all cores, where pip would use one.
# A package may contain a file for another Python, which is no failure.
COMPILE := $(BIN)/python -m compileall -q rtp_llm doctor && { $(BIN)/python -m compileall -qq -j 0 $(VENV) || true; }
# Tests often wait for the processes that they start, so there is a worker more than cores.
WORKERS ?= $(shell echo $$((1 + $$(nproc))))
# The workers share what they compile, also if the caller has set this variable.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## create .venv with what serving needs

serve: $(VENV)/installed ## serve CHECKPOINT_PATH (default: a demo model) with TP_SIZE ranks on PORT (10000)
	@exec env CHECKPOINT_PATH='$(CHECKPOINT_PATH)' TOKENIZER_PATH='$(TOKENIZER_PATH)' START_PORT='$(PORT)' \
	  TP_SIZE='$(TP_SIZE)' WORLD_SIZE='$(TP_SIZE)' $(BIN)/python -m rtp_llm.start_server

# The peers have a Python of their own, so that their packages change nothing here.
bench: $(VENV)/installed ## compare the speed with the peers installed; ARGS='--cases c1 --rounds 3' selects
	$(BIN)/python -m rtp_llm.bench table --folder build/bench $(if $(wildcard $(PEERS)),--peer-python $(PEERS)) $(ARGS)

bench-peers: ## install OpenVINO GenAI for `make bench`
	$(PYTHON) -m venv build/bench/peers
	$(PEERS) -m pip --disable-pip-version-check install --quiet openvino-genai gguf

test: $(VENV)/installed-dev ## run the quick tests; ARGS='-k name' selects some
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(VENV)/installed-triton ## run every test, as CI does
	$(BIN)/python -m rtp_llm.native.build supported
	$(PYTEST) $(ARGS)

# Without a network but loopback, so that a client that wants another server fails.
test-clients: $(VENV)/installed-clients build/clients/installed ## let clients and coding agents (npm) judge the API
	unshare --map-root-user --net sh -c 'ip link set lo up && exec "$$@"' sh \
	  $(BIN)/python -m pytest tests/clients $(ARGS)

# Hours; a call goes on where docs/reliability.jsonl ends, removing it starts afresh. ARGS='--lanes 3' runs three gangs
# side by side.
chaos: $(VENV)/installed-dev ## inject INJECTIONS (50) of each fault into real parts and write docs/reliability.md
	$(BIN)/python -m tests.chaos --injections $(or $(INJECTIONS),50) --records docs/reliability.jsonl \
	  --report docs/reliability.md $(ARGS)

# A GPU machine often has a Python with its own torch and no network: the suite uses that Python as it is.
HAS_TORCH := import importlib.util, sys; sys.exit(sys.version_info < (3, 11) or not importlib.util.find_spec("torch"))

test-gpu: ## run the GPU suite (docs/performance); RTP_TEST_DEVICE=cpu without a GPU
	@if [ ! -e $(VENV)/installed-dev ] && $(PYTHON) -c '$(HAS_TORCH)'; then exec $(PYTHON) -m tests.gpu $(ARGS); fi; \
	$(MAKE) --silent --no-print-directory $(VENV)/installed-dev && exec $(BIN)/python -m tests.gpu $(ARGS)

gpu-wheels: $(VENV)/created ## download packages for a GPU machine without a network, PYTHON_VERSION (3.12)
	$(BIN)/python -m tests.gpu.wheels $(or $(PYTHON_VERSION),3.12)

lint: $(VENV)/installed-dev ## check style, format, types and dead code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/vulture

clean: ## remove everything that these targets created
	rm -rf $(VENV) build *.egg-info rtp_llm/native/lib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamp files, one per layer of .venv. COMPILE does what pip leaves out here.
$(VENV)/torch $(VENV)/installed $(VENV)/installed-dev: export PIP_COMPILE = 0

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but $(PYTHON) is older: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python cannot create virtual environments: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Before the other packages, whose dependencies would otherwise install a torch build that does not fit the machine.
$(VENV)/torch: $(VENV)/created image/install-torch pyproject.toml
	$(BIN)/python image/install-torch
	@touch $@

# Also compiles the CPU kernels that a server uses on this CPU, see setup.py; `make test-all` those of its other levels.
KERNEL_SOURCES := setup.py $(wildcard rtp_llm/native/*.py rtp_llm/native/src/*)

$(VENV)/installed: $(VENV)/torch $(KERNEL_SOURCES)
	$(PIP) install --quiet --editable .
	$(COMPILE)
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch tests/constraints.txt $(KERNEL_SOURCES)
	$(PIP) install --quiet --editable '.[dev]' --constraint tests/constraints.txt
	$(COMPILE)
	@touch $(VENV)/installed $@

# Runs and compiles the kernels of GPUs without one. A torch for GPUs brings the Triton that fits it.
$(VENV)/installed-triton: $(VENV)/installed-dev
	$(PIP) install --quiet --no-deps 'triton>=3.6'
	@touch $@

$(VENV)/installed-clients: $(VENV)/installed-dev
	$(PIP) install --quiet --editable '.[dev,clients]' --constraint tests/constraints.txt
	@touch $@

build/clients/installed: tests/clients/package.json
	@mkdir -p build/clients
	cp tests/clients/package.json build/clients/
	npm install --prefix build/clients --no-audit --no-fund --loglevel=error
	@touch $@
