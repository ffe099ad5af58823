"""Parts that several formats use."""
