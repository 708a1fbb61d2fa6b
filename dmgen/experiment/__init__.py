"""A run from a configuration to a folder, and back."""
