"""An open disk: an image with its chain of parents, and what is read of it."""
