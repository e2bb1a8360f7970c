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

from distill.interrupt import LOST

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)


def hand_on(signum: int, frame: Any) -> None:
    """Send a signal to the processes that were started."""
    for child in psutil.Process().children():
        try:
            child.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def main(argv: list[str] | None = None) -> int:
    """Start the processes and wait for them; their exit code, or 76 where a signal ended one, which is named."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    try:
        run.main(["--signals-to-handle", "SIGINT", *(sys.argv[1:] if argv is None else argv)])
    except ChildFailedError as error:
        code, text = verdict({rank: failure.exitcode for rank, failure in error.failures.items()})
        print(*[f"distill: {text}"] * bool(text), file=sys.stderr)
        return code
    return 0


def verdict(codes: dict[int, int]) -> tuple[int, str]:
    """The exit code of a job whose processes ended with ``codes`` (by rank; negative: a signal), and what to say.

    torchrun ends the others with SIGTERM once one has failed: theirs are not the codes to tell.
    """
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    causes = {rank: code for rank, code in codes.items() if code not in ended} or codes
    told = [code for code in causes.values() if code > 0]
    killed = {rank: code for rank, code in causes.items() if code < 0 and not (told and code in ended)}
    names = ", ".join(f"rank {rank} by {signal.Signals(-code).name}" for rank, code in sorted(killed.items()))
    return told[0] if told else LOST, f"ended from outside: {names}; the same command continues" if names else ""


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
