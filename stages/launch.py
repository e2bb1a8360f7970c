"""torchrun, but for two things: what a scheduler signals goes to the ranks, and the exit code is theirs.

    srun python -m stages.launch --nnodes=2 --nproc-per-node=8 --master-addr=... -m stages.cli train RUN

torchrun itself ends its ranks at a signal, after 30 s by force, which is too short for a checkpoint, and exits with 1
whatever they exit with. Here a training that has written a checkpoint and exits with 75 makes its job exit with 75.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
OTHERS = "SIGINT,SIGHUP,SIGQUIT"
"""Signals at which torchrun ends its ranks."""


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node; 0, or the exit code of the first that failed (128 + the signal that killed it)."""
    node = os.environ.get("SLURM_NODEID", "0")
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        run(parse_args([f"--node-rank={node}", f"--signals-to-handle={OTHERS}", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank}, pid {failure.pid}: exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def pass_on(number: int, frame: Any) -> None:
    """Signal the ranks; where there are none yet, nothing is lost by ending here."""
    ranks = children(os.getpid())
    if not ranks:
        os._exit(128 + number)
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)


def children(parent: int) -> list[int]:
    """The processes that ``parent`` has started and that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(file.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
