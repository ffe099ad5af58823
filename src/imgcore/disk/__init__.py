"""An open disk: an image with its parents, the sources and sinks of a conversion."""
