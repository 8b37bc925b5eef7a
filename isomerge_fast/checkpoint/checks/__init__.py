"""Say what keeps checkpoints from being merged, by their headers and settings."""
