"""VMDK: VMware's disks."""
