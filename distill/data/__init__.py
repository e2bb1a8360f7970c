"""Training data: load, template, mask, pack; and the embedded reasoning traces."""
