"""The formats: a package for each, with its reader, writer, options and driver."""
