"""The verbs, one module each; none imports another."""
