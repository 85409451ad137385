# Everything a contributor or CI runs. The first call makes the environment it needs with python3 -m venv and pip;
# later calls find it made, until pyproject.toml or the constraints change.

PYTHON ?= python3
# Test processes side by side, each with one thread of torch: on two cores faster than one process with two threads.
JOBS ?= 2
ARGS ?=

# Nothing here may reach a hub, and every test process keeps to its core.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(OFFLINE) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist worksteal

NEW = .venv/.installed
LOWEST = .venv-lowest/.installed
KERNELS = .kernels/.installed

GPU_JOBS ?= 12
SIDE_BY_SIDE = $(PYTHON) -c 'import os; from importlib.util import find_spec; \
	jobs = min($(GPU_JOBS), os.cpu_count() or 1); \
	print(f"-n {jobs} --dist worksteal" if jobs > 1 and find_spec("xdist") else "")'

.PHONY: help demo test test-full test-lowest test-kernels check check-format check-lint check-types format gpu-test gpu-bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         fine-tune the small FP8 model that ships with octavo"
	@echo "make test         the tests, on the newest supported versions"
	@echo "make test-full    the same with the slow ones"
	@echo "make test-lowest  the integration tests, on the lowest supported versions"
	@echo "make test-kernels the Triton kernels, on the CPU: interpreted, and compiled for sm_90 without running"
	@echo "make check        format, lint and types"
	@echo "make format       put the format right"
	@echo "make gpu-test     the tests that need a GPU, with this machine's python3 and its packages"
	@echo "make gpu-bench    time and memory on a GPU, likewise"
	@echo "make clean        remove environments and caches"

demo: $(NEW)
	$(OFFLINE) .venv/bin/octavo demo $(ARGS)

test: $(NEW)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTEST) $(ARGS)

test-full: $(NEW)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTEST) -m "not gpu" $(ARGS)

test-lowest: $(LOWEST)
	PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" $(PYTEST) tests/integrations tests/nn tests/test_project.py $(ARGS)

# Triton lies in a folder of its own, in front of .venv: where it can be imported, torch and transformers take other
# ways, which is not what the other tests are about.
test-kernels: $(NEW) $(KERNELS)
	PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH="$(CURDIR)/.kernels" TRITON_INTERPRET=1 \
		$(PYTEST) tests/ops/kernels $(ARGS)

# Three targets, so that `make --keep-going check` tells what all of them find.
check: check-format check-lint check-types

check-format: $(NEW)
	.venv/bin/ruff format --check .

check-lint: $(NEW)
	.venv/bin/ruff check .

check-types: $(NEW)
	.venv/bin/mypy

format: $(NEW)
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# A GPU machine brings its own torch, built for its driver, so these two install nothing. Most of the time of the tests is
# compiling kernels, one process each: with pytest-xdist processes share the GPU, and Triton's and octavo's caches.
gpu-test:
	$(OFFLINE) PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu $$($(SIDE_BY_SIDE)) $(ARGS)

gpu-bench:
	$(OFFLINE) PYTHONPATH=src $(PYTHON) -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-lowest .kernels .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(NEW): pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,dev)

$(LOWEST): pyproject.toml constraints-lowest.txt
	$(call install,.venv-lowest,constraints-lowest.txt,test)

$(KERNELS): constraints-kernels.txt
	rm -rf .kernels
	$(PYTHON) -m pip install -qq --no-deps --target .kernels --requirement constraints-kernels.txt
	@touch $@

# install(FOLDER, CONSTRAINTS, EXTRA)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "octavo needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq --constraint $(2) --editable '.[$(3)]'
	@touch $@
endef
