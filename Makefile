# Everything starts here: `make demo` and `make test` set up their own environment.
PYTHON ?= python3
VENV ?= .venv
PURE ?= .venv-pure
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest

.PHONY: help demo docs test test-all test-fast test-pure test-oldest test-newest test-upstream check lint types imports format bench bench-more bench-check bench-fidelity bench-growth bench-planner bench-gpu clean

help:
	@echo "make demo       train a small GPT-2 four ways inside and outside a budget (out/)"
	@echo "make test       lint, types, import contracts, tests; of large matrices (models, budgets, seeds) some of each kind"
	@echo "make test-all   the same with whole matrices: an hour and a half on two cores"
	@echo "make test-fast  the tests without the slow ones"
	@echo "make test-oldest, make test-newest  the same on the oldest and the newest torch that is supported"
	@echo "make test-upstream TORCH_SRC=...  PyTorch's own checkpoint tests, of a source checkout, with ours in its place"
	@echo "make docs       the pages of docs/ as a site (build/docs/index.html); no network, warnings are errors"
	@echo "make bench      beside every peer (docs/benchmarks.md)"
	@echo "make bench-more the figures of README, checkpoint's costs, lengths"
	@echo "make bench-check  have a few ratios moved from the committed ones?"
	@echo "make bench-fidelity  are steps as high and as long as their plans said?"
	@echo "make bench-growth  what trains in the memory where plain just fits, and how costs grow"
	@echo "make bench-gpu  does it hold on a card, and beside every peer there?"
	@echo "make bench-planner  how near the optimum plans are, and how soon"

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null || timeout 60 $(BIN)/python -m playwright install chromium \
		|| echo "No Chromium: tests of the report's page will be skipped."
	@touch $@

$(PURE)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(PURE)
	$(PURE)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		numpy scipy ortools pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

# PIP_CONSTRAINT stands in the place of constraints that pip is configured with: these files say it all.
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	PIP_CONSTRAINT=constraints-oldest.txt $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

$(NEWEST)/.ready: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	PIP_CONSTRAINT=constraints-newest.txt $(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m keepless.demo

check: lint types imports

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The pages of docs/ as a site. Nothing is fetched; a warning is an error.
docs: $(VENV)/.ready
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees docs build/docs

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.ready
	$(BIN)/mypy

imports: $(VENV)/.ready
	$(BIN)/lint-imports

# Files of tests are handed to so many processes as these become free, the long ones first (tests/cpu/conftest.py); each
# computes with one thread.
WORKERS ?= 2
PYTEST := -m pytest -q --durations=10
SPREAD := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
test test-all test-fast test-pure: export OMP_NUM_THREADS := 1

# The half below the torch line, in an environment that has no torch.
test-pure: $(PURE)/.ready
	PYTHONPATH=src $(PURE)/bin/python $(PYTEST) $(SPREAD) tests/pure

# Both halves run, whatever the first one says. A device is for one process at a time.
define both-halves
@PYTHONPATH=src $(PURE)/bin/python $(PYTEST) $(SPREAD) $(1) tests/pure; pure=$$?; \
$(BIN)/python $(PYTEST) $(SPREAD) $(1) tests/cpu; cpu=$$?; \
$(BIN)/python $(PYTEST) $(1) tests/gpu; gpu=$$?; \
test $$pure -eq 0 -a $$cpu -eq 0 -a $$gpu -eq 0
endef

test: check $(PURE)/.ready
	$(call both-halves,-m "not exhaustive")

test-all: check $(PURE)/.ready
	$(call both-halves)

test-fast: $(VENV)/.ready
	$(BIN)/python $(PYTEST) $(SPREAD) -m "not slow and not exhaustive" tests/pure tests/cpu; rest=$$?; \
	$(BIN)/python $(PYTEST) -m "not slow and not exhaustive" tests/gpu && exit $$rest

# The half above the torch line on other releases of torch and transformers; PYTEST_ARGS chooses some of it.
PYTEST_ARGS ?= tests/cpu tests/gpu

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -m "not slow and not exhaustive" $(PYTEST_ARGS)

test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -m "not slow and not exhaustive" $(PYTEST_ARGS)

# PyTorch's own tests of checkpoint, with torch's function and with ours; TORCH_SRC is a checkout of its source.
test-upstream: $(VENV)/.ready
	$(BIN)/python tests/upstream/run.py "$(TORCH_SRC)"

# On quiet cores. PEERS_ARGS="--resume", "--models gpt2 t5" or "--quick", say.
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.peers $(PEERS_ARGS); status=$$?; \
	$(BIN)/python -m benchmarks.peers.pages && exit $$status

bench-check: $(VENV)/.ready
	$(BIN)/python -m benchmarks.peers.check

bench-more: $(VENV)/.ready
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.lengths

# An hour on 2 quiet cores; what has a row already is not run again. FIDELITY_ARGS="--first 12", say.
bench-fidelity: $(VENV)/.ready
	PYTHONHASHSEED=0 $(BIN)/python -m benchmarks.fidelity $(FIDELITY_ARGS); status=$$?; \
	$(BIN)/python -m benchmarks.fidelity_figures && exit $$status

# What fits where plain just fits, and how costs grow; what has rows is not run again. GROWTH_ARGS="--parts depth", say.
bench-growth: $(VENV)/.ready
	$(BIN)/python -m benchmarks.growth $(GROWTH_ARGS); status=$$?; \
	$(BIN)/python -m benchmarks.growth_figures && exit $$status

bench-planner: $(VENV)/.ready
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.order

# A card's; SECONDS is of each of the first two, what has rows is not run again.
bench-gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu $(if $(SECONDS),--seconds $(SECONDS))
	$(BIN)/python -m benchmarks.peers.card $(if $(SECONDS),--seconds $(SECONDS)) $(PEERS_ARGS); status=$$?; \
	$(BIN)/python -m benchmarks.peers.pages && exit $$status
	$(BIN)/python -m benchmarks.step --device cuda

clean:
	rm -rf $(VENV) $(PURE) $(OLDEST) $(NEWEST) out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
