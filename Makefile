# Two commands are all that a new user needs: `make serve` and `make test`. Each sets up .venv when it has to.

PYTHON ?= python3
MODEL ?= demo
PORT ?= 8000
ARGS ?=
SECONDS ?= 60
WORKERS ?= 2
CARDS ?= 75 80 86 89 90 100 120
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev

.PHONY: serve test test-slow test-page stress fuzz test-clients test-vllm-examples test-cluster test-agents test-compile check-install lint clean help

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt scripts/install
	@echo "Installing fastqwen into .venv (once, a minute or two) ..."
	@PYTHON=$(PYTHON) scripts/install
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "Installing what the tests need ..."
	@PYTHON=$(PYTHON) scripts/install dev
	@touch $@

serve: $(STAMP)  ## Serve MODEL (default: demo) on PORT (default: 8000); ARGS='...' adds flags
	@FASTQWEN_UNDER_MAKE=1 $(BIN)/fastqwen serve $(MODEL) --port $(PORT) $(ARGS)

test: $(DEV_STAMP)  ## Run the tests, in WORKERS processes (default: 2)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

test-slow: $(DEV_STAMP)  ## Run the tests that take long
	$(BIN)/python -m pytest -m "slow and not gpu" --ignore=tests/page --ignore=tests/reliability --ignore=tests/cluster

stress: $(DEV_STAMP)  ## Run the long reliability tests: load, soak, a hundred kills and a hundred drains
	$(BIN)/python -m pytest tests/reliability -m slow -s --timeout 2400

fuzz: $(DEV_STAMP)  ## Fuzz every parser for SECONDS (default: 60) in all
	@scripts/install fuzz
	$(BIN)/python -m tests.fuzz all $(SECONDS)

test-clients: $(DEV_STAMP)  ## Talk to a server with the clients that people use, each installed in a room of its own; LOAD=1 adds guidellm
	PYTHON=$(BIN)/python scripts/test_clients

test-vllm-examples: $(DEV_STAMP)  ## Run vLLM's own examples, from its source package, with one import line or an address changed
	$(BIN)/python scripts/vllm_examples.py

test-cluster: $(DEV_STAMP)  ## Run a cluster of real processes: kills, drains and replacements under load, in network namespaces where that may be, and on Ray
	@scripts/install cluster
	$(BIN)/python -m pytest -m "slow and not gpu" tests/cluster -s --timeout 1200

test-agents: $(DEV_STAMP)  ## Run Claude Code, Codex, qwen-code, opencode and aider against a scripted model (needs npm)
	PYTHON=$(BIN)/python scripts/test_agents

test-page: $(DEV_STAMP)  ## Test the chat page in headless Chromium (needs Debian's chromium on the PATH)
	@scripts/install page
	$(BIN)/python -m pytest -m "slow and not gpu" tests/page

test-compile: $(DEV_STAMP)  ## Compile what each model launches on a GPU of CARDS (compute capabilities), without one
	$(BIN)/python -m pytest -m slow tests/kernels/test_compile.py -k "$(shell echo $(CARDS) | sed 's/ / or /g')"

check-install: $(DEV_STAMP)  ## Ask the package index whether constraints.txt can be installed, for each Python; installs nothing
	$(BIN)/python scripts/check_install.py

lint: $(DEV_STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove .venv and build leftovers
	rm -rf .venv build dist *.egg-info
