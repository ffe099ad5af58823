"""QCOW2: QEMU's images, versions 2 and 3."""
