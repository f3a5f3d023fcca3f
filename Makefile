# Every target does its own set-up from nothing, and needs python3 (3.11 or later), pip and make.
# What it installs goes to .venv; it is done again where pyproject.toml has changed.

PYTHON ?= python3
WORKERS ?= 2
GPU_LIBRARIES ?= cupy,torch-cuda,jax-cuda
# Processes that share the GPU, each with memory of its own; more than 1 needs pytest-xdist.
GPU_WORKERS ?= 1
# The conformance suite proper: what runs on any library, and needs few packages.
GPU_TESTS := $(patsubst %,tests/test_%.py,attention values pieces masks callables sinks_dropout \
	bounded properties accuracy memory peers vjp gradient_accuracy \
	native interop interop_jax)

VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
RECORD := .capabilities/record.json
# Of the last `make gpu` on a machine that has a GPU; copied by hand.
GPU_RECORD := benchmarks/results/gpu-tests.json
# The folders are listed too: their time tells that a file was removed.
SOURCES := $(shell find chunkattn backends -name __pycache__ -prune -o -print)
# In small batches: what a worker is sent while a test measures its memory is counted with it.
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist load --maxschedchunk 50

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test slow gpu lint docs wheel vendor-test table check-table clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo  ## denoise a photograph: writes denoised.png
	$(RUN) -m chunkattn demo

test: $(VENV)/.test  ## the suite on all CPU libraries, doctests and README too; keeps the record
	mkdir -p $(dir $(RECORD))
	$(PYTEST) tests chunkattn backends --doctest-modules --ignore=backends/cupy.py \
		--capabilities $(RECORD)

slow: $(VENV)/.test  ## the tests that take more than half a minute each
	$(PYTEST) tests -m slow || [ $$? -eq 5 ]  # 5: there are none

# Installs nothing: tests with the libraries of $(PYTHON)'s environment, on a copy of the package.
# That environment has to have NumPy, array-api-compat, pytest and hypothesis beside the libraries
# under test; PYTHONPATH may add what it lacks.
gpu: build/package  ## the suite on CuPy, PyTorch and JAX with CUDA, in the environment of PYTHON
	mkdir -p $(dir $(RECORD))
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/package$${PYTHONPATH:+:$$PYTHONPATH}" \
		XLA_PYTHON_CLIENT_PREALLOCATE=false \
		$(PYTHON) -m pytest -p no:benchmark $(GPU_TESTS) -m 'not slow' --libraries $(GPU_LIBRARIES) \
		$(if $(filter-out 1,$(GPU_WORKERS)),-n $(GPU_WORKERS)) \
		--capabilities $(dir $(RECORD))gpu.json

lint: $(VENV)/.lint build/package  ## ruff, and mypy on a copy laid out as installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	cd build/package && $(CURDIR)/$(RUN) -m mypy --strict --package chunkattn \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

docs: $(VENV)/.docs  ## the documentation, to docs/_build
	$(RUN) -m sphinx --quiet --fail-on-warning --nitpicky --fresh-env docs docs/_build

wheel: build/wheel/.installed  ## wheel and sdist, to dist; the wheel is used in a new environment
	cd / && $(CURDIR)/build/wheel/bin/python -I $(CURDIR)/tools/smoke.py chunkattn

vendor-test: build/wheel/.installed  ## the package as a copied folder under another name
	rm -rf build/vendored
	cd / && $(CURDIR)/build/wheel/bin/python -I -m chunkattn vendor $(CURDIR)/build/vendored
	mv build/vendored/chunkattn build/vendored/renamed
	cd / && $(CURDIR)/build/wheel/bin/python -I $(CURDIR)/tools/smoke.py renamed \
		$(CURDIR)/build/vendored

table: $(VENV)/.test  ## write the README's capability table from the last `make test`
	$(RUN) tools/capabilities.py --write $(RECORD) $(GPU_RECORD)

check-table: $(VENV)/.test  ## fail where the README's capability table is not that of `make test`
	$(RUN) tools/capabilities.py --check $(RECORD) $(GPU_RECORD)

clean:  ## remove everything that these targets make
	rm -rf $(VENV) build dist docs/_build .capabilities *.egg-info denoised.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Makes the virtual environment $(1); where Python has no ensurepip, its pip comes by way of
# $(PYTHON)'s own.
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) \
	else "Python 3.11 or later is needed (make PYTHON=...); this is " + sys.version)'
@$(PYTHON) -m venv $(1) >/dev/null 2>&1 || { rm -rf $(1) && \
	$(PYTHON) -m venv --without-pip $(1) && \
	$(PYTHON) -m pip --disable-pip-version-check --python $(1)/bin/python install --quiet pip; }
endef

# Stamps: each is touched once its install has succeeded.
$(VENV)/.pip:
	$(call make_venv,$(VENV))
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	@echo "Installing what the demo needs: NumPy, matplotlib and others"
	$(RUN) $(PIP_INSTALL) -e '.[demo]'
	@touch $@

# PyTorch goes first and alone: so pip takes a CPU build where one is at hand.
$(VENV)/.test: $(VENV)/.pip pyproject.toml
	@echo "Installing what the tests need, PyTorch and JAX among it: this takes minutes"
	$(RUN) $(PIP_INSTALL) $(TORCH)
	$(RUN) $(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.pip pyproject.toml
	$(RUN) $(PIP_INSTALL) -e '.[demo,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.pip pyproject.toml
	$(RUN) $(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.build: $(VENV)/.pip
	$(RUN) $(PIP_INSTALL) 'build>=1.2'
	@touch $@

# The package with backends/ in its place, as an installation has it.
build/package: $(SOURCES)
	rm -rf $@
	mkdir -p $@
	cp -R chunkattn $@/
	cp -R backends $@/chunkattn/
	find $@ -name __pycache__ -prune -exec rm -rf {} +
	@touch $@

build/wheel/.installed: $(VENV)/.build $(SOURCES) pyproject.toml MANIFEST.in README.md LICENSE
	rm -rf dist build/wheel
	mkdir -p build
	$(RUN) -m build >build/log 2>&1 || { cat build/log; exit 1; }
	$(RUN) tools/smoke.py --archives dist
	$(call make_venv,build/wheel)
	build/wheel/bin/python $(PIP_INSTALL) "$$(ls dist/*.whl)[numpy]"
	@touch $@
