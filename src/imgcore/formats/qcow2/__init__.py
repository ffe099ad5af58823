"""QCOW2, QEMU's image format: versions 2 and 3."""
