"""VHD: the disks of Virtual PC, Hyper-V, Azure and XenServer."""
