"""VHDX: the disks of Hyper-V."""
