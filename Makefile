# `make demo` and `make test` are the two commands to begin with; `make help` lists the others.
#
# Everything is installed into .venv, in the versions of constraints.txt. From PyPI, torch for Linux comes with gigabytes
# of CUDA libraries. Where the CPU is enough:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
RECIPE ?= weights/tiny-glm/recipe.toml

.PHONY: help demo test test-slow check book figures train bench bench-gpu clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

# A command as one would type it, then what it does.
define run
	@printf '\n$$ %s\n' '$(1)'
	@PATH="$(CURDIR)/$(BIN):$$PATH"; $(1)

endef

demo: .venv/.run ## ask the embedded model in English and in Chinese, and have it fill a blank
	$(call run,printf "%s\n" "What is blank infilling?" "什么是空白填充？" | glm chat)
	$(call run,glm infill "Attention is [MASK]. Every query is compared with every visible key.")

test: .venv/.test ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: .venv/.test ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/.test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

book: .venv/.book ## the book, its chapters run and their assertions held, into build/book
	$(BIN)/python docs/figures.py --check
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --show-traceback --jobs auto docs build/book

figures: .venv/.book ## draw the pictures in the repository anew
	$(BIN)/python docs/figures.py

train: .venv/.test ## train tiny-glm from nothing, in about half an hour
	$(BIN)/glm train $(RECIPE)

bench: .venv/.test ## measure memory and speed on this machine
	@for script in $$(grep -l __main__ kernels/bench/*.py); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

bench-gpu: .venv/.test ## measure the kernels, the engine and their peers on this machine's GPU
	$(BIN)/python -m glm_kernels.bench all --out kernels/results/
	$(BIN)/glm bench all --out kernels/results/
	$(BIN)/python docs/tables.py

clean: ## remove .venv and everything else that was made
	rm -rf .venv build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find glm kernels tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp is written when a step has ended well, so that one cut short is done again.

.venv/.run: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and this is %s; name another one: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Setting up .venv, once, in a few minutes: torch first …"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "… then the package and what else it needs"
	@$(INSTALL) --editable .
	@touch $@

.venv/.test: .venv/.run
	@echo "Adding what the tests need"
	@$(INSTALL) --editable ".[test,check]"
	@touch $@

.venv/.book: .venv/.run
	@echo "Adding what the book needs"
	@$(INSTALL) --editable ".[book]"
	@touch $@
