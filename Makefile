# Two commands do everything on a fresh machine, set-up included:
#     make quickstart     the whole pipeline on the CPU recipe, ending in a report;
#     make test           lint and tests
# and for developers
#     make mutants        wrong edits of the package, one at a time: do the tests notice?
#     make bench          how fast it is, beside the peers; BENCH="--long --write-docs" adds flags
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test mutants bench clean

quickstart: $(VENV)/ready
	$(RUN) quickstart.py $(if $(RECIPE),--recipe $(RECIPE))

test: $(VENV)/ready-to-test
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

mutants: $(VENV)/ready-to-test
	$(RUN) tests/mutants.py

bench: $(VENV)/ready-to-test
	$(RUN) benchmarks/run.py $(BENCH)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: requirements.txt requirements-extras.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt
	touch $@

$(VENV)/ready-to-test: requirements.txt requirements-test.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) arithmetic_llm/model/__pycache__/kernels.*.so
