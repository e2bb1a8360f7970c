"""Sequence operators of the mixers: a plain reference beside each fast path."""
