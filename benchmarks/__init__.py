"""Measurements against qemu-img, and of imgcore's own parts; see BENCHMARKING.md."""
