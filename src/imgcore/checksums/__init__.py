"""Digests of disks, and the trees of their blocks."""
