#!/usr/bin/env bash
# Installs the missing Debian packages for building and testing imgcore.
# tools/setup.sh [arm64|valgrind|wheel]: also those for this target of the Makefile.
set -euo pipefail

missing=()
needs_library() { pkg-config --exists "$1" 2>/dev/null || missing+=("$2"); }
needs_program() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2"); }

command -v gcc >/dev/null || missing+=(gcc libc6-dev)
needs_program make make
needs_program pkg-config pkg-config
needs_program mke2fs e2fsprogs
needs_program mkfs.xfs xfsprogs
needs_program mkfs.btrfs btrfs-progs
needs_program zstd zstd
needs_program qemu-img qemu-utils
needs_program nbdinfo libnbd-bin
needs_program bmaptool bmap-tools
if command -v pkg-config >/dev/null; then
  needs_library libcrypto libssl-dev
  needs_library libdeflate libdeflate-dev
  needs_library libisal libisal-dev
  needs_library libzstd libzstd-dev
  needs_library liburing liburing-dev
  needs_library zlib zlib1g-dev
else
  missing+=(libssl-dev libdeflate-dev libisal-dev libzstd-dev liburing-dev zlib1g-dev)
fi
if command -v gcc >/dev/null && ! echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1; then
  missing+=(libc6-dev)
fi
if ! command -v "${PYTHON:-python3}" >/dev/null; then
  missing+=(python3 python3-venv python3-dev)
elif [[ ! -x .venv/bin/python ]]; then
  headers='import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))'
  "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  [[ -e $("${PYTHON:-python3}" -c "$headers") ]] || missing+=(python3-dev)
fi

case ${1:-} in
arm64)
  needs_program qemu-aarch64 qemu-user
  needs_program aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
  needs_program mmdebstrap mmdebstrap
  ;;
valgrind) needs_program valgrind valgrind ;;
wheel)
  needs_program qemu-x86_64 qemu-user
  needs_program nasm nasm
  needs_program xz xz-utils
  needs_program perl perl
  ;;
esac

(( ${#missing[@]} )) || exit 0
if ! command -v apt-get >/dev/null; then
  echo "imgcore: not found: ${missing[*]} (names of Debian's packages); install them and run make again" >&2
  exit 1
elif (( EUID == 0 )); then
  run=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  run=(sudo)
else
  echo "imgcore: run this as root, then make again: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "imgcore: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${run[@]}" apt-get update -q &&
  "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "imgcore: apt-get could not install: ${missing[*]}" >&2
  exit 1
fi
