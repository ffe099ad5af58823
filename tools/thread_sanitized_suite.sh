#!/usr/bin/env bash
# Builds the extension with ThreadSanitizer, proves that it finds a deliberate fault, and
# runs the tests of images that many threads change: tools/thread_sanitized_suite.sh
# [TESTS...].  Only code of the extension is watched, so CPython needs no suppressions.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
out=$PWD/build/sanitize-threads
mkdir -p "$out"
IMGCORE_SANITIZE=thread "$python" setup.py -q build --build-lib "$out/lib" \
  --build-temp "$out/temp" 2>"$out.log" || { tail -n 20 "$out.log" >&2; exit 1; }
preload=$(gcc -print-file-name=libtsan.so)
# Without random addresses, which it does not always cope with.  Programs that the tests
# start are not watched: most do not run so.
run() {
  LD_PRELOAD=$preload PYTHONPATH="$out/lib" TSAN_OPTIONS="log_path=$out/report" \
    setarch -R "$python" -c 'import os, runpy, sys
del os.environ["LD_PRELOAD"]
sys.argv = sys.argv[1:]
if sys.argv[0] == "-c":
    exec(sys.argv[1])
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' "$@"
}
rm -f "$out"/report.*
canary=$(echo "$out"/lib/imgcore/_canary*.so)
run -c "import ctypes; ctypes.CDLL('$canary').imgc_canary_race()" || true
grep -qs 'data race' "$out"/report.* || {
  echo "sanitize: the deliberate race went unnoticed: this build checks nothing" >&2
  exit 1
}
rm -f "$out"/report.*
run -c "import imgcore._core as c; assert c.__file__.startswith('$out'), c.__file__"
if [ $# -eq 0 ]; then
  set -- tests/unit/test_in_place_core.py tests/oracle/test_concurrent_updates.py
fi
run pytest -q -n 0 "$@" || status=$?
for report in "$out"/report.*; do
  [ -e "$report" ] || continue
  cat "$report" >&2
  status=1
done
exit "${status:-0}"
