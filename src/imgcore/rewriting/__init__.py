"""Conversion without copying: blocks stay in their file, and its tables are new."""
