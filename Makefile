# Each target is a thin name for a command of the README.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCALE ?= quick
EXPERIMENT := $(if $(filter paper,$(SCALE)),accuracy,$(SCALE))
ARGS ?=
PINNED := $(addprefix requirements/,requirements.lock torch.txt slurm.txt ray.txt triton.txt)
STUDIES := estimator_error schoenbat_approximation ppsbn_ablation favor_variance favor_regression \
  favor_attention_error expressivity frontier

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test data report dashboard studies bench lock audit clean lint

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo; echo "  SCALE=paper   with reproduce: a published protocol on the official data; with studies: their full scale"
	@echo "  ARGS='...'    further overrides, for example ARGS='seed=0,1,2 device=cuda'"

setup: $(READY)  ## .venv with the pinned packages (Python 3.11 to 3.13)

$(READY): requirements/requirements.lock requirements/torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --require-hashes --no-deps -r requirements/requirements.lock
	$(BIN)/python -m pip install -qq -r requirements/torch.txt
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $(READY)

reproduce: $(READY)  ## the quick table: five tasks, five attentions, under 10 minutes on two cores
	@$(BIN)/python run.py experiment=$(EXPERIMENT) $(ARGS)

test: $(READY)  ## the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

data: $(READY)  ## what data is here and how to get the rest; TASK=listops SOURCE=generated prepares one
	@$(if $(SOURCE),$(if $(TASK),,$(error SOURCE=$(SOURCE) needs TASK=<task>)))$(BIN)/python run.py job=data \
	  $(if $(TASK),job.prepare=true task=$(TASK)) $(if $(SOURCE),task.source=$(SOURCE)) $(ARGS)

report: $(READY)  ## tables and the figure again, and results/report.html, from the ledger alone
	@$(BIN)/python run.py job=report experiment=$(EXPERIMENT) $(ARGS)
	@$(BIN)/python run.py job=html_report

dashboard: $(READY)  ## the wandb workspace: saved with an account, else checked and printed
	@$(BIN)/python run.py job=dashboard $(ARGS)

studies: $(READY)  ## the papers' other claims (quick scale; SCALE=paper: full), and results/runs/studies/studies.md
	@for study in $(STUDIES); do $(BIN)/python run.py experiment=$$study study.scale=$(SCALE) $(ARGS) || exit 1; done
	@$(BIN)/python run.py job=studies_report

bench: $(READY)  ## speed and memory of the slot, the training step and the loop
	@$(BIN)/python run.py job=benchmark $(ARGS)

lint: $(READY)  ## style checks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lock:  ## resolve requirements.in anew (needs uv); torch stays pinned in requirements/torch.txt
	echo torch > .excluded && uv pip compile -q --universal --python-version 3.11 --excludes .excluded --generate-hashes \
	  --no-header --no-annotate --upgrade requirements/requirements.in -o requirements/requirements.lock; rm -f .excluded

audit:  ## known vulnerabilities of every pinned package (pip-audit, in a folder of its own; needs the network)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv $$folder && $$folder/bin/python -m pip install -qq pip-audit==2.10.1 || { \
	  echo "audit: pip could not install pip-audit. Nothing was audited. Try again where pip reaches its registry."; exit 1; }; \
	sed -n 's/^\([A-Za-z0-9].*==[^\\]*\).*/\1/p' $(PINNED) | sort -u > $$folder/pinned; \
	$$folder/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --desc off -o $$folder/found -r $$folder/pinned \
	  2>$$folder/said && { echo "audit: no known vulnerability in what requirements/ pins for this Python"; exit 0; }; \
	if test -s $$folder/found; then cat $$folder/found; \
	  echo "audit: raise what is listed in requirements/ (make lock resolves requirements.in anew), then: make setup test"; \
	else tail -n 1 $$folder/said; \
	  echo "audit: nothing was audited, for the reason above. pip-audit asks the Python Package Index: try again where it is reached."; \
	fi; exit 1

clean:  ## remove .venv and caches; results and data sets stay
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
