# Every target sets up what it needs in .venv (tools/setup.sh; ZSAA_PYTHON=... uses another environment).
#   make test ARGS="-k dial"   passes options to pytest;   JOBS=1 runs the tests in one process

HERE := $(dir $(realpath $(lastword $(MAKEFILE_LIST))))
ifneq ($(realpath $(HERE)),$(realpath $(CURDIR)))
$(error this Makefile works in its own folder: make -C $(HERE))
endif

# Whoever says that Python shall write no bytecode waits half a minute longer: for pytest to prepare each test file anew.
export PYTHONDONTWRITEBYTECODE :=

JOBS ?= 2
ARGS ?=
PYTHON = python=$$(tools/setup.sh)
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
STRIP = "$$python" -m nbstripout --keep-id
# One thread per test process: torch's own threads would fight over the cores.
# By loadscope a file is one process' own: what its tests share, such as a server, is made once. In the order of names: by
# their number of tests, as pytest-xdist would have them, files of few long tests come last, and one process waits.
PYTEST = $(PYTHON) && OMP_NUM_THREADS=1 "$$python" -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder

.PHONY: help setup lint format test test-all test-rest compat figures report site lock clean distclean

help:       ## this list
	@grep -E '^[a-z-]+: +.*##' Makefile | sed -E 's/:[^#]*## /\t/'

setup:      ## make .venv, or bring it up to date
	@$(PYTHON) && echo "$$python"

lint:       ## style, formatting, types of the method, who imports whom, and notebooks without outputs
	@$(PYTHON) && { "$$python" -m mypy & types=$$!; "$$python" -m ruff check . && "$$python" -m ruff format --check . && \
	"$$python" -m pytest -q -p no:cacheprovider --noconftest tests/test_arrows.py && \
	$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS),true); rest=$$?; wait $$types && [ $$rest = 0 ] || \
	{ echo "lint failed; 'make format' mends most of it"; exit 1; }; }

format:     ## mend what lint complains of, where a tool can
	@$(PYTHON) && "$$python" -m ruff check --fix . ; "$$python" -m ruff format . && \
	$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS),true)

test: lint  ## lint, then every promise once
	@$(PYTEST) -m "not full" $(ARGS)

test-all: lint ## lint, then all tests: also each family in each setting, a browser, several processes, the wheel, the examples
	@$(PYTEST) $(ARGS)

test-rest:  ## what test-all has more than test
	@$(PYTEST) -m full $(ARGS)

compat:     ## test, but with the oldest versions that pyproject.toml allows, in a throwaway environment
	@JOBS=$(JOBS) tools/compat.sh $(ARGS)

figures:    ## from the committed results: results/points.csv and README.md, and figures/
	@$(PYTHON) && "$$python" -m zsaa.kit.points && "$$python" -m zsaa.kit.catalogue && "$$python" -m zsaa.kit.figures && "$$python" -m ablation.show

report:     ## write docs/report.html and docs/report.md from the committed results and figures
	@$(PYTHON) && "$$python" -m zsaa.kit.report

site:       ## the documentation site, build/site, with the notebooks as outputs/ci or outputs/smoke has them
	@$(PYTHON) && "$$python" tools/site_pages.py

lock:       ## remake requirements.lock from pyproject.toml
	@tools/lock.sh

clean:      ## remove caches and build products; .venv and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv and outputs too
	rm -rf .venv outputs .setup.*
