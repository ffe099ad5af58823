#!/usr/bin/env bash
# Converts an image of a real file system from raw to QCOW2, streamOptimized VMDK and
# back to raw, and compares.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
megabytes=${DEMO_MIB:-320}
folder=build/demo
mkdir -p "$folder"
trap 'rm -rf "$folder"' EXIT

step() {
  local title=$1 start end
  shift
  start=$(date +%s%N)
  "$@"
  end=$(date +%s%N)
  printf '%-46s %6d ms\n' "$title" $(((end - start) / 1000000))
}
show() { printf '  %-34s %8d KiB on disk\n' "$1" "$(du -k "$1" | cut -f1)"; }

echo "imgcore $(imgcore --version | grep -o '[0-9][0-9.]*' | head -n 1): an ext4 file system of installed files, $megabytes MiB"
step "mke2fs -d (the source)" "$python" tools/make_image.py "$folder/disk.raw" "$megabytes"
show "$folder/disk.raw"
step "imgcore convert raw -> qcow2 (zlib)" imgcore convert -q -c "$folder/disk.raw" "$folder/disk.qcow2"
show "$folder/disk.qcow2"
step "imgcore convert qcow2 -> streamOptimized" imgcore convert -q -o subformat=streamOptimized \
  "$folder/disk.qcow2" "$folder/disk.vmdk"
show "$folder/disk.vmdk"
step "imgcore convert streamOptimized -> raw" imgcore convert -q "$folder/disk.vmdk" "$folder/back.raw"
show "$folder/back.raw"
imgcore info "$folder/disk.vmdk"
step "imgcore compare source, streamOptimized" imgcore compare "$folder/disk.raw" "$folder/disk.vmdk"
step "cmp source, result" cmp "$folder/disk.raw" "$folder/back.raw"
if command -v qemu-img >/dev/null; then
  step "qemu-img compare source, qcow2 (a second opinion)" \
    qemu-img compare -f raw -F qcow2 "$folder/disk.raw" "$folder/disk.qcow2"
fi
echo "demo: identical"
