"""Raw: only the guest's bytes."""
