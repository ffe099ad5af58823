"""Raw: the guest's bytes and nothing else."""
