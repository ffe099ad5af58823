"""The formats: each a package with a reader, a writer and the driver that names both."""
