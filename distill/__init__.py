"""Pretrained transformers to fast hybrids: score, swap, distil, measure.

Importing the package registers the hybrid architectures with transformers' Auto classes.
"""

from distill.hybrid import model as _model  # noqa: F401

__version__ = "0.1.0"
