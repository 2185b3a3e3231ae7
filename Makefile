# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled to bytecode then; to compile all of torch and transformers takes minutes.
INSTALL := pip install --quiet --no-compile --constraint constraints.txt
# Installs what an extra needs: to install fxquant with it would compile the extension once more.
require = $(BIN)/python tests/extra.py $(1) > $(VENV)/$(1).txt && \
    $(BIN)/python -m $(INSTALL) --requirement $(VENV)/$(1).txt

.PHONY: demo environment test test-models test-browser test-runtimes fuzz docs lint sanitize arm benchmark wheel test-wheel clean

demo: $(VENV)/installed
	$(BIN)/fxquant demo

# What all of CI needs: jobs that run side by side install nothing then.
environment: $(VENV)/installed-dev
	$(call require,browser)
	$(call require,docs)

# Half the tests run models of others; a process a core, since each test takes one thread only.
test: $(VENV)/installed-dev lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

# All 110 architectures of the zoo instead of a third, and more random models: over half an hour.
test-models: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive FXQUANT_ALL_MODELS=1 FXQUANT_EXAMPLES=300 \
	    $(BIN)/python -m pytest -n auto --dist worksteal tests/tracing/test_zoo.py \
	    tests/test_random_models.py

# Needs Debian's packages chromium and chromium-driver.
test-browser: $(VENV)/installed-dev
	$(call require,browser)
	$(BIN)/python -m pytest --override-ini addopts= --import-mode=importlib tests/browser

# Libraries too heavy for CI, which run what fxquant makes. Those that CI has (ONNX Runtime, gguf,
# transformers with compressed-tensors, diffusers, PEFT) are in `make test`. Needs Debian's cmake.
test-runtimes: $(VENV)/installed-dev
	$(call require,runtimes)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
	    --override-ini addopts= --import-mode=importlib tests/runtimes

# 100,000 mutated files in worker processes: about an hour on two cores.
fuzz: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.fuzz.run 100000

# The pages in build/site; the tutorial is run, and a warning is an error.
docs: $(VENV)/installed-dev
	$(call require,docs)
	OMP_WAIT_POLICY=passive NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ extension on random products, weights, attention and norms, checked against double under
# two sanitizers.
# libgomp's own memory would count as leaked.
CSRC := fxquant/kernels/csrc
CHECKS := $(addprefix build/sanitize/,check_linear check_rounding check_attention check_norm check_convolution)
KERNEL := $(patsubst $(CSRC)/%.cpp,build/sanitize/%.o,$(filter-out $(CSRC)/module%,$(wildcard $(CSRC)/*.cpp)))
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
# GCC takes twice as long over the unrolled products otherwise: -g1 still names the lines.
FAST_COMPILE := -g1 -fira-region=one

sanitize: $(CHECKS)
	printf '%s 500\n' $^ | ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    OMP_WAIT_POLICY=passive xargs -P $$(nproc) -L 1 env

$(CHECKS): %: %.o $(KERNEL)
	$(CXX) -fopenmp $(SANITIZERS) $^ -o $@

# The same checks for 64-bit Arm, cross-compiled and emulated: Debian's packages g++-aarch64-linux-gnu
# and qemu-user. The emulated CPUs have and have not the dot product of bytes.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_ROOT ?= /usr/aarch64-linux-gnu
ARM_CHECKS := $(patsubst build/sanitize/%,build/arm/%,$(CHECKS))
ARM_KERNEL := $(patsubst build/sanitize/%,build/arm/%,$(KERNEL))

arm: $(ARM_CHECKS)
	printf -- '-cpu %s 60\n' $(foreach cpu,max cortex-a53,$(addprefix '$(cpu) ,$(addsuffix ',$^))) | \
	    OMP_WAIT_POLICY=passive xargs -P $$(nproc) -L 1 qemu-aarch64 -L $(ARM_ROOT)

$(ARM_CHECKS): %: %.o $(ARM_KERNEL)
	$(ARM_CXX) -fopenmp $^ -o $@

build/arm/%.o: %.cpp $(wildcard $(CSRC)/*.h tests/kernels/*.h)
	mkdir -p $(@D)
	$(ARM_CXX) -std=c++17 -O2 -fopenmp -ffp-contract=off -Wall -Wextra -I$(CSRC) -c $< -o $@

vpath %.cpp $(CSRC) tests/kernels
build/sanitize/%.o: %.cpp $(wildcard $(CSRC)/*.h tests/kernels/*.h)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -fopenmp -ffp-contract=off -Wall -Wextra $(FAST_COMPILE) \
	    $(SANITIZERS) -I$(CSRC) -c $< -o $@

benchmark: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/int4.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/quantizing.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/sensitivity.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/scale.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/accuracy.py

# A manylinux wheel in dist/. OpenMP is not copied into it: torch brings the library that both share,
# and a second copy would keep threads of its own.
wheel: $(VENV)/installed-dev
	rm -rf build/wheel dist
	$(BIN)/python -m build --wheel --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 \
	    --wheel-dir dist build/wheel/*.whl

# The wheel in an environment of its own, where nothing can be compiled.
test-wheel: wheel
	rm -rf build/wheel-env
	$(PYTHON) -m venv build/wheel-env
	CC=false CXX=false build/wheel-env/bin/python -m $(INSTALL) dist/*.whl
	cd build/wheel-env && CC=false CXX=false bin/python ../../tests/check_wheel.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m $(INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed pyproject.toml constraints.txt
	$(call require,dev)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
