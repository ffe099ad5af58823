#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UBSan, proves that they find deliberate
# faults, and runs the Python suite on it: tools/sanitized_suite.sh [TESTS...], by
# default all but the slow ones.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
out=$PWD/build/sanitize
export IMGCORE_SANITIZE=address,undefined
"$python" setup.py -q build --build-lib "$out/lib" --build-temp "$out/temp" 2>"$out.log" ||
  { tail -n 20 "$out.log" >&2; exit 1; }
# Other programs hang with preloaded sanitizers: wrappers run them without.
export IMGCORE_PEERS=$out  # the wrappers, not the programs of the home folder
mkdir -p "$out/bin"
for program in qemu-img qemu-io qemu-nbd vbox-img gcc cc; do
  found=$(command -v "$program") || continue
  printf '#!/bin/sh\nunset LD_PRELOAD\nexec %s "$@"\n' "$found" >"$out/bin/$program"
  chmod +x "$out/bin/$program"
done
export PATH="$out/bin:$PATH"
preload="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
run() {
  LD_PRELOAD=$preload PYTHONMALLOC=malloc PYTHONPATH="$out/lib" \
    ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:quarantine_size_mb=32:allocator_may_return_null=1:log_path=$out/report \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$out/report "$python" "$@"
}
canary=$(echo "$out"/lib/imgcore/_canary*.so)
fault() { run -c "import ctypes; ctypes.CDLL('$canary').imgc_canary_$1"; }
fault 'assert(0)'
dies() {
  rm -f "$out"/report.*
  if fault "$1" 2>"$out/canary.log" || ! grep -qs "$2" "$out/canary.log" "$out"/report.*; then
    echo "sanitize: the deliberate fault $1 went unnoticed: this build checks nothing" >&2
    exit 1
  fi
}
dies 'overread()' heap-buffer-overflow
dies 'overflow(5)' 'signed integer overflow'
dies 'assert(1)' 'Assertion'
run -c "import imgcore._core as c; assert c.__file__.startswith('$out'), c.__file__"
rm -f "$out"/report.*  # reports of the deliberate faults
run -m pytest -q --hypothesis-profile slow "${@:-tests}" ${PYTEST_ARGS:-} || status=$?
# pytest may have captured a report, or a child process may have died with one.
for report in "$out"/report.*; do
  if grep -q 'ERROR: \|runtime error' "$report" 2>/dev/null; then
    cat "$report" >&2
    status=1
  fi
done
exit "${status:-0}"
