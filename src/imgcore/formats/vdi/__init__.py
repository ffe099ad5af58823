"""VDI: VirtualBox's disks."""
