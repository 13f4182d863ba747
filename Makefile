# The commands of the course. `make` lists them.
#
# Every command makes the environment (.venv) if it is missing, and renews it when the dependencies changed.

# The first Python of a version that the course supports. Another one: make lab PYTHON=/path/to/python3.12
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done),python3)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# More for JupyterLab, for example: make lab LAB_FLAGS="--no-browser --port=9000"
LAB_FLAGS ?=
# Jupyter refuses to run as root, which is who one is in most containers, unless it is told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# Notebooks for `make measure`; all of them when empty: make measure NOTEBOOKS=notebooks/in_depth/03_gradient_checkpointing.ipynb
NOTEBOOKS ?=

# Tests and notebooks run in this many processes, and these share the cores. A GPU's memory is not shared well:
# there the notebooks take turns.
JOBS ?= $(if $(wildcard /dev/nvidia0),1,2)
# A cell may take an hour: a machine that has much else to do has to pass, too.
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 --nbval-sanitize-with tests/nbval_sanitize.cfg

# What operators take for themselves depends on the processor's instructions and on the number of threads, and
# nothing may rest on it. So the tests can run as on another processor: make test PROCESSOR=sse41 THREADS=4
# `make test ROTATE=1` takes the setting whose turn it is today, `make test-processors` one after the other.
SETTINGS := native/1 avx2/4 native/4 sse41/1
TODAY := $(if $(ROTATE),$(shell echo $$(( $$(date +%s) / 86400 % $(words $(SETTINGS)) + 1 ))),1)
PROCESSOR ?= $(firstword $(subst /, ,$(word $(TODAY),$(SETTINGS))))
THREADS ?= $(lastword $(subst /, ,$(word $(TODAY),$(SETTINGS))))
AS_native :=
AS_avx2 := ONEDNN_MAX_CPU_ISA=AVX2
# torch.compile's cache does not tell processors apart: this one needs its own.
AS_sse41 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/compiled-sse41
# More threads than cores have to wait without keeping a core busy.
AS_PROCESSOR = $(AS_$(PROCESSOR)) OMP_NUM_THREADS=$(THREADS) MEMLAB_TEST_THREADS=$(THREADS) OMP_WAIT_POLICY=PASSIVE
SAY_PROCESSOR = @$(if $(filter native avx2 sse41,$(PROCESSOR)),,$(error PROCESSOR is native or avx2 or sse41, not 	'$(PROCESSOR)')) echo "==> As on the processor: $(PROCESSOR), $(THREADS) thread(s) in each process"

.DEFAULT_GOAL := help
.PHONY: help lab measure measure-large zoo report validate doctor test lint test-unit test-notebooks test-in-depth test-processors test-gpu \
	test-browser test-colab address constraints clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

lab: .venv/.installed ## open the course in JupyterLab
	@echo "==> Starting JupyterLab; if no browser opens, open the address that it prints (Control-C twice ends it)"
	.venv/bin/python -m jupyterlab --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks/00_measuring_memory.ipynb $(AS_ROOT) $(LAB_FLAGS)

measure: .venv/.installed ## run the notebooks on this machine's device and print the before/after table
	.venv/bin/python -m memlab measure $(NOTEBOOKS)

measure-large: .venv/.installed ## run the capstone's ladder on GPT-2 124M (on a CPU: 16 GiB, most of an hour on two cores)
	MEMLAB_SCALE=large .venv/bin/python -m memlab measure --cells large --timeout 36000 11_capstone

zoo: .venv/.installed ## predict and measure small models of many kinds on the CPU (most of an hour on two cores)
	OMP_NUM_THREADS=1 .venv/bin/python -m tools.zoo
	.venv/bin/python -m memlab report

doctor: .venv/.installed ## show the device, its scale, and whether the meter measures right here
	.venv/bin/python -m memlab doctor

report: .venv/.installed ## write the tables of README.md and results/README.md from the records
	.venv/bin/python -m memlab report

validate: .venv/.installed ## predict the H100's records again, without it, and write results/predictions.json and its table
	nice .venv/bin/python -W ignore -m memlab.course.validate $(NOTEBOOKS)
	.venv/bin/python -m memlab report

test: lint test-unit test-notebooks ## run everything that CI runs (ROTATE=1: as on another processor each day; PROCESSOR=, THREADS=)

test-processors: lint ## run everything as on each processor, with 1 and with 4 threads (two hours on two cores)
	set -e; for setting in $(SETTINGS); do \
		$(MAKE) test-unit test-in-depth test-notebooks PROCESSOR=$${setting%/*} THREADS=$${setting#*/}; done

lint: .venv/.installed ## check the style, the arrows between the rooms, and the dependencies
	@echo "==> Style, arrows, dependencies (a few seconds)"
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check --quiet . || { echo "Format it: .venv/bin/python -m ruff format ."; exit 1; }
	.venv/bin/lint-imports --no-logo
	.venv/bin/deptry --no-ansi memlab tools
	.venv/bin/deptry --no-ansi --ignore DEP002,DEP004 tests

test-unit: .venv/.installed ## run the tests of the package and of the repository's rules
	@echo "==> Tests, in $(JOBS) processes (about twenty-five minutes on two cores; what is skipped is listed at the end with its reason)"
	$(SAY_PROCESSOR)
	$(AS_PROCESSOR) .venv/bin/python -m pytest -n $(JOBS) --dist=loadscope -rs -m "not browser and not in_depth" tests

test-notebooks: .venv/.installed ## run every notebook from top to bottom
	@echo "==> Notebooks, in $(JOBS) processes (about a minute each on two cores)"
	$(SAY_PROCESSOR)
	$(AS_PROCESSOR) .venv/bin/python -m pytest -n $(JOBS) --dist=loadscope -rs $(NBVAL) notebooks

test-in-depth: .venv/.installed ## run the solutions of the notebooks in depth (ten minutes on two cores; no part of `make test`)
	@echo "==> Solutions in depth, in $(JOBS) processes"
	$(AS_PROCESSOR) .venv/bin/python -m pytest -n $(JOBS) --dist=loadscope -m in_depth tests/test_solutions.py

test-gpu: .venv/.installed ## run the tests that need a CUDA device
	.venv/bin/python -m pytest -rs -m gpu tests

test-browser: .venv/.installed ## run a notebook in a real browser (needs chromium; skipped without it)
	@echo "==> A notebook in a real browser (up to a minute)"
	.venv/bin/python -m pytest -rs -m browser tests/test_browser.py

test-colab: .venv-colab/.installed ## run notebook 00 on the versions that Google Colab has
	PYDEVD_DISABLE_FILE_VALIDATION=1 .venv-colab/bin/python -m pytest -rs $(NBVAL) notebooks/00_measuring_memory.ipynb \
		notebooks/in_depth/00_measuring_memory.ipynb

address: .venv/.installed ## write the repository's address (pyproject.toml) into the badges and wherever it is named
	.venv/bin/python tools/address.py
	.venv/bin/python -m memlab report

constraints: ## pin anew the versions that CI uses (torch stays as constraints.txt has it)
	@$(CHECK_PYTHON)
	@echo "==> Solving the dependencies in a fresh environment (about two minutes)"
	rm -rf build/constraints && mkdir -p build/constraints
	grep '^torch==' constraints.txt > build/constraints/torch.txt
	$(PYTHON) -m venv build/constraints/venv
	build/constraints/venv/bin/python -m pip install --constraint build/constraints/torch.txt \
		--editable '.[course,dev,integrations]'
	grep '^#' constraints.txt > build/constraints/new.txt
	build/constraints/venv/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' \
		| sed 's/+[^=]*$$//' | LC_ALL=C sort -f >> build/constraints/new.txt
	mv build/constraints/new.txt constraints.txt
	rm -rf build/constraints

clean: ## remove the environments and what runs left behind
	rm -rf .venv .venv-colab build memlab.egg-info .pytest_cache .ruff_cache

# The environments. The stamp is written last, so an interrupted installation is taken up again.

.venv/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "==> Preparing the environment .venv with $(PYTHON) (at first about two minutes and 2 GB; with CUDA 7 GB)"
	@.venv/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --constraint constraints.txt --editable '.[course,dev,integrations]'
	@touch $@

.venv-colab/.installed: pyproject.toml constraints-colab.txt
	@$(CHECK_PYTHON)
	@echo "==> Preparing the environment .venv-colab with $(PYTHON) (at first about two minutes)"
	@.venv-colab/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-colab
	.venv-colab/bin/python -m pip install --constraint constraints-colab.txt --editable . \
		ipykernel nbval pytest scikit-learn
	@touch $@

define CHECK_PYTHON
	$(PYTHON) -c '$(SUPPORTED)' 2> /dev/null || { \
	    echo "The course needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is `$(PYTHON) --version 2> /dev/null || echo not there`."; \
	    echo "Install one of them and run this again, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.13"; \
	    exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	    echo "$(PYTHON) cannot make environments: its 'venv' module is missing."; \
	    echo "On Debian and Ubuntu: sudo apt install python3-venv"; \
	    exit 1; }
endef
