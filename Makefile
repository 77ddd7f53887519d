# Everything runs in .venv, which the first target that needs it creates and the others reuse.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PACKAGING := pyproject.toml setup.py

.PHONY: demo demo-mm test lint clean

demo: .venv/.tools
	$(BIN)/python tools/demo.py --output demo

demo-mm: .venv/.mm
	$(BIN)/python tools/demo_mm.py --output demo-mm

# A thread for each worker: more would fight over the processor.
test: .venv/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf demo demo-mm data/scenes build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip: there, pip installs itself into the environment.
$(BIN)/pip:
	$(PYTHON) -m venv .venv || ( \
		$(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python $(BIN)/python install pip )

.venv/.tools: $(PACKAGING) | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[tools]'
	touch $@

.venv/.mm: $(PACKAGING) | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[tools,mm]'
	touch .venv/.tools $@

.venv/.dev: $(PACKAGING) | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[tools,dev,mm]'
	touch .venv/.tools .venv/.mm $@
