"""VDI: the disks of VirtualBox."""
