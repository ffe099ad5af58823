"""The Python face of the native engine: extents, geometry, batches, jobs."""
