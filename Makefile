# Everything runs from one virtual environment in the checkout, .venv, with the versions in constraints.txt.
#
#   make demo         install what the program needs and summarize an example radiograph
#   make test         add the development and conversion extras and run the tests
#   make lint         ruff: rules and formatting
#   make types        mypy, strict
#   make wheel-check  build the wheel and use it in an empty environment
#   make clean        remove .venv and everything built, llama.cpp included

PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/synthetic-cr-monochrome1.dcm
# Twice quiet: once still prints a line for every package index that is not reachable. Errors are printed.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test lint types wheel-check clean native

demo: .venv/.demo
	$(BIN)/xraygpt-lite summarize $(EXAMPLE)

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads folders, and converters/ and models/ lie inside the package only once it is installed: it is shown the
# installed layout, made of links.
types: .venv/.dev
	rm -rf build/types
	mkdir -p build/types/xraygpt_lite/models
	ln -s "$(CURDIR)"/xraygpt_lite/* "$(CURDIR)/converters" build/types/xraygpt_lite
	ln -s "$(CURDIR)"/models/*.py build/types/xraygpt_lite/models
	ln -s "$(CURDIR)/benchmarks" "$(CURDIR)/tools" build/types
	cd build/types && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" \
		-p xraygpt_lite -p benchmarks -p tools

wheel-check: .venv/.dev
	$(BIN)/python tools/check_wheel.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The files below are stamps: nothing is installed again until what they depend on changes.

.venv/.made:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv .venv
	touch $@

# Asked on every run (it takes a tenth of a second): another compiler or another CPU wants another build.
native: .venv/.made
	@$(BIN)/python tools/native.py --install

.venv/.demo: pyproject.toml constraints.txt tools/native.py | native
	$(PIP) -e ".[cpu]"
	touch $@

.venv/.dev: .venv/.demo
	$(PIP) -e ".[cpu,convert,dev]"
	touch $@
