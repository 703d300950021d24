# Two commands for a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Further implementations to compare GPTQ with: --peer NAME=INTERPRETER, as often as wanted.
GPTQ_PEERS ?=
# Where Torch-Pruning is installed, see benchmarks/torch_pruning_worker.py; without it there are no such rows.
TORCH_PRUNING ?=

.PHONY: demo test slow exhaustive lint types layers docs benchmark clean

demo: $(VENV)/.demo
	$(BIN)/python benchmarks/sentence_embeddings.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not exhaustive"

# Sanitizers, compilation of kernels, whole decoders, killed runs: tests that take long by themselves.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not exhaustive"

# The same checks on more architectures, kernels and seeded bugs: before a release, and when CUDA sources change.
exhaustive: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m exhaustive

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy finds the package by its name through a link, because the repository root is the package.
types: $(VENV)/.dev
	mkdir -p .typecheck && ln -sfn .. .typecheck/planish
	MYPYPATH=.typecheck $(BIN)/mypy -m planish -m planish.compiler -m planish.cli -m planish.cli_cache -m planish.cli_explain -m planish.cli_generate -m planish.cli_plan -m planish.cli_options -m planish.cli_pruning -m planish.cli_search -m planish.cli_tables \
		-p planish.ir -p planish.codegen -p planish.planning -p planish.search -p planish.runtime -p planish.passes
	MYPYPATH=.typecheck:docs $(BIN)/mypy -m hooks -p generators

layers: $(VENV)/.dev
	$(BIN)/lint-imports

# The site, into site/; a link or page that is missing is an error.
# Not quietly: warnings that are not said are not counted, and strictness is about them.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmark: $(VENV)/.bench
	$(BIN)/python benchmarks/sentence_embeddings.py --peers
	$(BIN)/python benchmarks/tracing.py
	$(BIN)/python benchmarks/foreign_onnx.py
	$(BIN)/python benchmarks/graph_speed.py
	$(BIN)/python benchmarks/contract.py
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/gptq_peers.py $(GPTQ_PEERS)
	$(BIN)/python benchmarks/gptq_cost.py
	$(BIN)/python benchmarks/pruning_oracles.py
	$(BIN)/python benchmarks/pruning_quality.py $(if $(TORCH_PRUNING),--torch-pruning $(TORCH_PRUNING))
	$(BIN)/python benchmarks/pruning_tasks.py
	$(BIN)/python benchmarks/pruning_composition.py
	$(BIN)/python benchmarks/pruning_cost.py

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and pinned, so that nothing later may ask for another build of it.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .typecheck build site *.egg-info
