"""Streams: the bytes of a disk in order, through a compressor or into an archive."""
