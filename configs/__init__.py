"""The configurations that we ship, found by their short names."""
