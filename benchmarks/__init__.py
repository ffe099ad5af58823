"""Measurements against qemu-img, and of parts of imgcore; see BENCHMARKING.md."""
