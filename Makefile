# Two commands on a fresh machine: `make demo` and `make test`. Everything else is a part of them.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test check path slow golden docs lint types bench gpu clean

# Core packages at the committed versions, this package, and the bundled model.
$(VENV)/.core: requirements/core.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/core.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/evertune model get smollm2-135m
	touch $@

# The test oracles and the checkers on top.
$(VENV)/.dev: $(VENV)/.core requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@

demo: $(VENV)/.core
	$(BIN)/evertune demo

# Two files at a time, one thread each: most tests wait for children or for one core.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

check: lint types
	$(BIN)/pytest tests/test_imports.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

path: $(VENV)/.dev
	$(BIN)/pytest -m path

# Flower pins older versions than the core's, so it has an environment of its own.
$(VENV)-federated/.done: requirements/torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-federated
	$(VENV)-federated/bin/pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	$(VENV)-federated/bin/pip install --quiet --disable-pip-version-check --editable ".[federated,privacy]"
	touch $@

slow: $(VENV)/.dev $(VENV)-federated/.done
	EVERTUNE_FLOWER=$(VENV)-federated/bin/python $(BIN)/pytest -m slow

# Rewrites the golden files; read the difference like code.
golden: $(VENV)/.dev
	EVERTUNE_GOLDEN=write $(BIN)/pytest tests/test_golden.py

docs: $(VENV)/.core
	$(BIN)/python -m evertune.recipe.reference docs/recipe.md
	$(BIN)/python -m evertune.method_pages docs

# The speed suite beside TRL and lm-eval; DATA is a folder of JSONL files, see benchmarks/suite.py.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.suite --data $(DATA)

# Training on DEVICE by its tests, then steps beside TRL with Liger, rollouts and probes; DATA is a folder of JSONL files.
# On a machine without a GPU: make gpu DEVICE=cpu, which runs all of it but the kernels.
DEVICE := cuda
gpu: $(VENV)/.dev
	@test -n "$(DATA)" || { echo "make gpu DATA=folder [DEVICE=cpu]"; exit 2; }
	if [ $(DEVICE) = cuda ]; then $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[gpu]"; fi
	EVERTUNE_TEST_DEVICE=$(DEVICE) $(BIN)/pytest tests/train tests/model/test_packing.py
	$(BIN)/python -m benchmarks.gpu --device $(DEVICE) --data $(DATA)

clean:
	rm -rf $(VENV) $(VENV)-federated demo-run
