"""VMDK, VMware's disk format."""
