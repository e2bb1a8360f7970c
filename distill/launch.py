"""torchrun, with the exit codes of what it starts, and with its signals handed on.

    python -m distill.launch --nproc-per-node 8 -m stages.cli train RUN

Arguments are torchrun's. torchrun itself ends with 1 whatever its processes ended with, dies of a SIGUSR1, and kills
what has not ended 30 s after a SIGTERM. Here the processes get SIGTERM and SIGUSR1, finish their step, write a
checkpoint, however long that takes, and their exit code is that of this program (75 after SIGUSR1: run me again).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import psutil

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)


def hand_on(signum: int, frame: Any) -> None:
    """Send a signal to the processes that were started."""
    for child in psutil.Process().children():
        try:
            child.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def main(argv: list[str] | None = None) -> int:
    """Start the processes and wait for them; their exit code (the first that failed)."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    given = sys.argv[1:] if argv is None else argv
    try:
        run.main(["--signals-to-handle", "SIGINT", *given])
    except ChildFailedError as error:
        # torchrun ends the others with SIGTERM once one has failed: theirs are not the codes to tell
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        told = [code for code in codes if code > 0] or codes
        if any(code < 0 for code in codes):
            print(error, file=sys.stderr)
        return told[0] if told[0] > 0 else 128 - told[0]
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
