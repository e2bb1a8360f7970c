"""One verb per file; each reads one folder and writes another."""
