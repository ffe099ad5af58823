#!/usr/bin/env bash
# Builds imgcore for arm64 and tests it under emulation:
# tools/test_arm64.sh [PYTEST ARGUMENT...]
#
# The native tests must run the NEON and CRC32 variants.  The emulated Python builds a
# wheel with a cross compiler.  The unit and property tests run on the unpacked wheel,
# without those of Compute Engine's archives, which have whole GiB and take minutes.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
out=$PWD/build/arm64
tree=$(PYTHON="$python" tools/arm64_tree.sh)
export IMGCORE_EXPECT_VARIANTS=zero=neon,crc32c=armv8

make --no-print-directory -C native test BUILD="$out/native" CC="$tree/bin/cc" \
  PKG_CONFIG="$tree/bin/pkg-config" RUN="$tree/bin/run"

rm -rf "$out/dist" "$out/installed"
mkdir -p "$out/egg"
CC="$tree/bin/cc" LDSHARED="$tree/bin/cc -shared" PKG_CONFIG="$tree/bin/pkg-config" \
  PYTHONPATH="$tree/site" "$tree/bin/python" setup.py -q egg_info --egg-base "$out/egg" \
  build --build-base "$out/build" bdist_wheel --dist-dir "$out/dist" 2>"$out/wheel.log" ||
  { tail -n 20 "$out/wheel.log" >&2; exit 1; }
"$python" -m pip --disable-pip-version-check install -qq --no-deps --target "$out/installed" \
  --python-version 3.11 --only-binary=:all: --platform linux_aarch64 "$out"/dist/imgcore-*.whl
run() { PYTHONPATH="$out/installed:$tree/site" "$tree/bin/python" "$@"; }
run -c "import platform, imgcore._core as c
assert platform.machine() == 'aarch64' and c.__file__.startswith('$out'), c.__file__"
(( $# )) || set -- tests/unit tests/property -k "not gce"
run -m pytest -q --hypothesis-profile slow "$@" ${PYTEST_ARGS:-}
