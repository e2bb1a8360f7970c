"""Measures of teacher and hybrids: accuracy, throughput, and the report that sets one against the other."""
