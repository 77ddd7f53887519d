# All targets run in .venv, which is created when it is first needed.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PACKAGING := pyproject.toml setup.py
TIMM = $(shell $(BIN)/python -c 'import timm; print(timm.__version__)')

.PHONY: demo demo-medical demo-mm test test-fast test-medical test-transformers test-targets test-export test-timm lint docs clean

demo: .venv/.tools
	$(BIN)/python tools/demo.py --output demo

demo-mm: .venv/.mm
	$(BIN)/python tools/demo_mm.py --output demo-mm

# The images of the demo are files of stardist, which is not imported.
demo-medical: .venv-medical/.done
	$(BIN)/python -m pip --python .venv-medical/bin/python install --no-deps stardist
	.venv-medical/bin/python tools/demo_medical.py --output demo-medical

# One thread per worker: more would compete for the cores.
test: .venv/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# A quick subset: operators in plain PyTorch, layers and models. Takes two minutes on two cores.
test-fast: .venv/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" -k "not triton" \
		tests/kernels tests/layers tests/models

# What needs nnU-Net and MONAI, and layers and models with the version of timm that these need, in an environment of its
# own.
test-medical: .venv-medical/.done
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-medical/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" \
		-k "not triton" tests/medical tests/layers tests/models

# What needs transformers, in an environment on top of .venv: with torch 2.14, dispatch modes of later tests in the same
# process end in segmentation faults.
test-transformers: .venv-transformers/.done
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-transformers/bin/python -m pytest tests/models/test_hub.py \
		tests/models/test_transformers.py tests/tools/test_push.py tests/sequence/test_pretrained.py

# Compiles every kernel of the models for each GPU architecture, without a GPU. Takes an hour on two cores.
test-targets: .venv/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -rP --confcutdir tests/targets tests/targets

# Exports every registered variant to ONNX and compares it with PyTorch. Takes hours on two cores.
test-export: .venv/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -rP -p no:logging --confcutdir tests/exports tests/exports

# timm's own model tests on the models of this library (see tests/timm_plugin.py). They come from timm's source
# distribution, which is downloaded in the installed version. Takes 40 minutes on two cores.
test-timm: .venv/.dev
	test -d .venv/timm-$(TIMM) || ( \
		$(BIN)/python -m pip download --no-deps --no-binary timm -d .venv timm==$(TIMM) && \
		tar -xzf .venv/timm-$(TIMM).tar.gz -C .venv timm-$(TIMM)/tests timm-$(TIMM)/pyproject.toml )
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -n $(WORKERS) \
		-c .venv/timm-$(TIMM)/pyproject.toml -p timm_plugin .venv/timm-$(TIMM)/tests/test_models.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf demo demo-medical demo-mm data/scenes build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv-medical/.done: $(PACKAGING) | $(BIN)/pip
	$(PYTHON) -m venv --without-pip .venv-medical
	$(BIN)/python -m pip --python .venv-medical/bin/python install -e '.[medical]' 'pytest>=8' pytest-xdist
	touch $@

.venv-transformers/.done: .venv/.dev
	$(PYTHON) -m venv --without-pip .venv-transformers
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv-transformers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dev.pth
	$(BIN)/python -m pip --python .venv-transformers/bin/python install 'transformers>=5'
	$(BIN)/python -m pip --python .venv-transformers/bin/python install --no-deps --no-build-isolation -e .
	touch $@

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
