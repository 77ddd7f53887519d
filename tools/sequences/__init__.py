"""Data sets of long sequences."""
