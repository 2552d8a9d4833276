# Hone: the commands a newcomer needs. `make demo` and `make test` do all their own set-up.
ENGINE ?= cpu
BIN := .venv/bin
READY := .venv/.ready-$(ENGINE)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo serve test faults histories compat check format curves clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv (ENGINE=cpu or gpu)

$(READY): pyproject.toml deploy/install.sh deploy/overrides.txt deploy/constraints.txt
	deploy/install.sh $(ENGINE)
	@touch $@

demo: $(READY) ## An agent learns a real desk's house rules from outcomes (ARGS="--seed 2 --group 6")
	$(BIN)/python -m examples.desk.demo $(ARGS)

serve: $(READY) ## Leave the desk and Hone running, for you to play with
	$(BIN)/python -m examples.desk.play $(ARGS)

test: check ## Check, then run every test on the real engine (ARGS="tests/policy --durations=9")
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: $(READY) ## Kill, cut power, fail disks, stop servers: thousands of times (5 minutes)
	$(BIN)/python -m tests.faults

compat: $(READY) ## Have other people's clients, suites and MCP servers use it (needs node)
	$(BIN)/python -m pytest tests/compat/mcp_registry.py tests/compat/clients.py tests/compat/sinks.py $(ARGS)

histories: $(READY) ## Tell 2,000 histories of feedback in other orders, and find one answer
	HONE_HISTORIES=2000 $(BIN)/python -m pytest tests/feedback/test_histories.py $(ARGS)

check: $(READY) ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

curves: $(READY) ## Run the demo for three seeds, K=1 and K=6, and draw docs/curve.png (an hour)
	$(BIN)/python -m benchmarks.learning

clean: ## Remove .venv, caches and what demos wrote; the record that `make serve` keeps stays
	rm -rf .venv .compat .hypothesis .import_linter_cache .mypy_cache .ruff_cache build dist
	rm -rf var/demo var/curves
