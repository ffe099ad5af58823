"""VHDX: Hyper-V's disks."""
