"""lm-eval's own command line, which knows hybrids here: ``python -m distill.lm_eval run --model hf ...``.

lm-eval makes the model by its name before it reads a task, and has no way to be told what to import first; running it
from inside this package is that way. Every argument is lm-eval's.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
