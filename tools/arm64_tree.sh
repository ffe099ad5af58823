#!/usr/bin/env bash
# Makes a folder with an arm64 Debian 12 for builds and emulation, and prints its name:
#
#   root/           headers, libraries and Python, only unpacked
#   site/           the Python packages that imgcore and its tests need
#   bin/cc          the cross compiler
#   bin/pkg-config  finds the libraries in root/
#   bin/run         runs an arm64 program under qemu
#   bin/python      runs the arm64 Python, with its child processes
#
# The folder is $IMGCORE_ARM64_TREE, by default in the user's cache.  It is made again
# when this script changes.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
tree=${IMGCORE_ARM64_TREE:-${XDG_CACHE_HOME:-$HOME/.cache}/imgcore-arm64}
stamp=$tree/made-by
made_by=$(sha256sum <"$0")

if [[ -e $stamp && $(<"$stamp") == "$made_by" ]]; then
  echo "$tree"
  exit 0
fi
echo "imgcore: making an arm64 Debian in $tree" >&2
if [[ ! -e $stamp && -n $(ls -A "$tree" 2>/dev/null) ]]; then
  echo "imgcore: $tree holds something else; set IMGCORE_ARM64_TREE to another folder" >&2
  exit 1
fi
rm -rf "$tree"
mkdir -p "$tree/bin" "$tree/root"
: >"$stamp"

# The machine's Debian mirror has arm64 as well.
mirror=${IMGCORE_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/*$')}
packages=(libc6-dev libgcc-12-dev libssl-dev libdeflate-dev libisal-dev libzstd-dev liburing-dev
  zlib1g-dev python3 libpython3-dev)
mmdebstrap --quiet --variant=extract --architectures=arm64 --format=tar \
  --include="$(IFS=,; echo "${packages[*]}")" bookworm - "$mirror" |
  tar -x -C "$tree/root" --no-same-owner --exclude='./dev'

"$python" -m pip --disable-pip-version-check install -qq --target "$tree/site" --only-binary=:all: \
  --implementation cp --python-version 3.11 --platform manylinux2014_aarch64 \
  --platform manylinux_2_28_aarch64 'numpy>=1.26' 'zstandard>=0.22' 'click>=8.1' 'rich>=13' \
  'pytest>=8' 'hypothesis>=6.100' 'pytest-benchmark>=4' 'dissect.hypervisor>=3.16' 'setuptools>=77' \
  'Cython>=3.1,<4' >&2

write() { cat >"$tree/bin/$1" && chmod +x "$tree/bin/$1"; }
write cc <<EOF
#!/bin/sh
exec aarch64-linux-gnu-gcc --sysroot='$tree/root' "\$@"
EOF
write pkg-config <<EOF
#!/bin/sh
export PKG_CONFIG_SYSROOT_DIR='$tree/root'
export PKG_CONFIG_LIBDIR='$tree/root/usr/lib/aarch64-linux-gnu/pkgconfig:$tree/root/usr/share/pkgconfig'
exec pkg-config "\$@"
EOF
# The emulator runs the loader; -L would also redirect the files that programs open.
loader="qemu-aarch64 '$tree/root/lib/ld-linux-aarch64.so.1' --library-path \
  '$tree/root/lib/aarch64-linux-gnu:$tree/root/usr/lib/aarch64-linux-gnu'"
write run <<EOF
#!/bin/sh
exec $loader "\$@"
EOF
# argv[0], and so sys.executable, is this script: child processes do not need binfmt.
write python <<EOF
#!/bin/sh
export PYTHONHOME='$tree/root/usr' PYTHONNOUSERSITE=1
exec $loader --argv0 "\$0" '$tree/root/usr/bin/python3.11' "\$@"
EOF
echo "$made_by" >"$stamp"
echo "$tree"
