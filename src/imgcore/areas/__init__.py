"""Changed areas of a disk, and files that list them."""
