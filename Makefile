# Every target works in a clean clone: it installs what is missing.
#
#   make quick         lint, native tests, unit tests: under 90 s on two cores
#   make demo          raw -> QCOW2 -> streamOptimized -> raw of a real disk, compared
#   make test          lint, native tests (plain and sanitized), the Python suite
#   make coverage      lines of the package and the native core that no test runs
#   make bench         the table of ratios against qemu-img (long)
#   make sanitize      native tests: ASan, UBSan, TSan; Python suite: ASan, UBSan;
#                      its tests with many writers: TSan
#   make valgrind      the native codec, table and kernel tests under memcheck
#   make test-arm64    native and Python tests for arm64, under emulation
#   make wheel         a wheel for this machine, checked, run in an empty environment
#   make peers-test    the slow tests, with the programs of $IMGCORE_PEERS, if set
#   make rewrite-test  every pair of formats without copying, in place and by reflink
#   make crosscheck    random images against other programs, $CROSSCHECK_SECONDS (120)
#   make faults        full disks, read errors, kills, power cuts in every format; some
#                      need root
#   make fuzz          every fuzz target for FUZZ_SECONDS (60) each; see docs/fuzzing.md
#   make types         the types of the public names are complete for pyright
#   make docs          the site in build/site; warnings and broken links are errors
#   make lint native-test clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.imgcore-ready
DOCS_STAMP := $(VENV)/.imgcore-docs
PYTEST_ARGS ?=
# As many workers as cores, at most 8; a debugger needs PYTEST_ARGS="-n 0".
PARALLEL := -n auto --maxprocesses 8 --dist loadgroup
JOBS := -j$(shell nproc)
FUZZ_SECONDS ?= 60
FUZZ_FLAGS = -max_total_time=$(FUZZ_SECONDS) -timeout=30 -rss_limit_mb=2048 -max_len=65536 \
	-print_final_stats=1

.NOTPARALLEL:
.PHONY: all setup build demo quick test lint types native-test native-sanitize sanitize python-test \
	coverage valgrind test-arm64 wheel peers-test rewrite-test crosscheck faults bench docs fuzz \
	fuzz-merge clean

all: build

setup:
	@tools/setup.sh

# The environment is updated when the files that define it change.  `build` rebuilds
# the extension, and compiles the modules as an installation does, so that the command
# starts as fast as an installed one.
$(STAMP): pyproject.toml setup.py
	@tools/setup.sh
	@test -x $(PY) || PYTHON="$(PYTHON)" tools/make_venv.sh $(VENV)
	@$(PIP) install 'setuptools>=77' 'Cython>=3.1,<4'
	@$(PIP) install --no-build-isolation -e '.[test]'
	@touch $@

build: $(STAMP)
	@$(PY) setup.py -q build_ext --inplace
	@$(PY) -m compileall -q src/imgcore

demo: build
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHON="$(PY)" tools/demo.sh

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest imgcore._core --allowlist tests/stubtest-allowlist.txt
	find native tests -name '*.[ch]' -not -path 'native/build/*' -print0 | \
		xargs -0 -n 8 -P 8 $(VENV)/bin/clang-format --dry-run --Werror

# How complete the types are for users; basedpyright brings its Node.js (300 MB).
types: build
	@$(PIP) install 'basedpyright==1.40.2'
	@$(PY) -m pytest -q -p no:xdist tests/unit/test_public_types.py

native-test: setup
	@$(MAKE) --no-print-directory $(JOBS) -C native test

native-sanitize: setup
	@$(MAKE) --no-print-directory $(JOBS) -C native asan ubsan

python-test: build
	@$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test: lint native-test native-sanitize python-test

QUICK_TESTS := tests/unit tests/test_architecture.py tests/test_promises.py

quick: lint native-test build
	@$(PY) -m pytest -q $(PARALLEL) $(PYTEST_ARGS) $(QUICK_TESTS)
	@echo "quick: lint, types, native tests and $(QUICK_TESTS) passed."
	@echo "quick: left to make test: the sanitizers and the other folders of tests/."

# Traces the tests and all processes that they start.  Killed processes leave broken
# records, which are dropped.  The report is printed even if a test fails.
coverage: build
	@rm -rf build/coverage && mkdir -p build/coverage
	@status=0; $(PY) -m coverage run -m pytest $(PARALLEL) $(PYTEST_ARGS) || status=$$?; \
		$(PY) -W ignore -m coverage combine -q; rm -f build/coverage/data.*; \
		$(PY) -m coverage report && exit $$status
	@$(MAKE) --no-print-directory $(JOBS) -C native coverage

# Native tests under every sanitizer, then the Python suite on sanitized extensions.
sanitize: build native-sanitize
	@$(MAKE) --no-print-directory -C native tsan
	@PYTHON="$(PY)" tools/sanitized_suite.sh
	@PYTHON="$(PY)" tools/thread_sanitized_suite.sh

valgrind:
	@tools/setup.sh valgrind
	@$(MAKE) --no-print-directory -C native valgrind

test-arm64: build
	@tools/setup.sh arm64
	@PYTHON="$(PY)" tools/test_arm64.sh

wheel: $(STAMP)
	@tools/setup.sh wheel
	@PYTHON="$(PY)" tools/make_wheel.sh

peers-test: build
	@$(PY) -m pytest -m "(slow or peers) and not crosscheck and not rewriting" $(PYTEST_ARGS)

rewrite-test: build
	@$(PY) -m pytest $(PARALLEL) -m rewriting tests/oracle $(PYTEST_ARGS)

crosscheck: build
	@$(PY) -m pytest -s -m crosscheck tests/crosscheck $(PYTEST_ARGS)

faults: build
	@$(PY) -m pytest -m "slow or not slow" tests/faults tests/test_promises.py $(PYTEST_ARGS)

bench: build
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m benchmarks $(BENCH_ARGS)

$(DOCS_STAMP): $(STAMP)
	@$(PIP) install --no-build-isolation -e '.[docs]'
	@touch $@

docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Coverage-guided: the C core by libFuzzer (clang), the readers by atheris.
fuzz: build
	@command -v clang >/dev/null || \
		{ echo "fuzz: clang is missing (Debian: clang libclang-rt-14-dev)" >&2; exit 1; }
	@$(PIP) install 'atheris>=3'
	@$(MAKE) --no-print-directory -C native fuzz FUZZ_SECONDS=$(FUZZ_SECONDS)
	@set -e; for name in readers updates areas trees; do \
		echo "fuzz_$$name: $(FUZZ_SECONDS) s"; \
		corpus=tests/fuzz/corpus; \
		case $$name in areas|trees) corpus=$${corpus}_$$name;; esac; \
		mkdir -p build/fuzz/$$name; \
		$(PY) -m tests.fuzz.fuzz_$$name $(FUZZ_FLAGS) -artifact_prefix=build/fuzz/$$name- \
			build/fuzz/$$name $$corpus >build/fuzz/$$name.log 2>&1 || \
			{ tail -n 60 build/fuzz/$$name.log; exit 1; }; \
		grep -a stat::number_of_executed_units build/fuzz/$$name.log; \
	done

# Keeps the inputs that reach something that smaller ones do not.
fuzz-merge: build
	@$(MAKE) --no-print-directory -C native fuzz-merge
	@mkdir -p build/fuzz/readers build/fuzz/areas build/fuzz/trees
	@$(PY) -m tests.fuzz.minimise tests/fuzz/corpus build/fuzz/readers
	@$(PY) -m tests.fuzz.minimise tests/fuzz/corpus_areas build/fuzz/areas
	@$(PY) -m tests.fuzz.minimise tests/fuzz/corpus_trees build/fuzz/trees

clean:
	@$(MAKE) --no-print-directory -C native clean
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	rm -f src/imgcore/*.so src/imgcore/_core.c
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
