"""Weights that are larger than the device: bind once, then move only bytes."""
