"""An open disk: an image with its chain of parents, what is read from and what is written to."""
