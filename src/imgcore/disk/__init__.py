"""Open disks: an image with its parents, and the sources and sinks of conversions."""
