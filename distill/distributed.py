"""The processes of one job: who they are, what they tell each other, and what ends them when one is lost.

torchrun (or ``python -m distill.launch``) starts WORLD_SIZE processes. A ``Job`` takes the variables that say so out of
the environment, so that every library takes its process for a single one, and puts them back for the time of a training
(``together``). The first process leads: it does what one process can do, and posts what all have to do; the others
follow. Every process shows a sign of life in the job's store, and what its training has come to; the first watches all
of them, all watch the first. Who has been silent for longer than the bound is named, and the job ends.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from distill import interrupt
from distill.errors import UserError, brief

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
"""What a launcher sets that makes libraries take their process for one of several."""
BEAT = 1.0
"""Seconds between signs of life."""
Result = TypeVar("Result")


def world() -> int:
    """How many processes share the training under way; 1 outside ``Job.together``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among those that share the training."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def agreed(decide: Callable[[], Result]) -> Result:
    """What ``decide()`` returns on the first process, on all of them; an error that it raises is raised on all."""
    if world() == 1:
        return decide()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = decide()
        except Exception as error:
            found[1] = brief(error, 2000)
            dist.broadcast_object_list(found, src=0)
            raise
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def largest(value: int) -> int:
    """The largest ``value`` of all processes."""
    if world() == 1:
        return value
    tensor = torch.tensor([value], device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def summed(*values: float) -> list[float]:
    """The sums over all processes of each of ``values``, in double precision."""
    if world() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def wait_for_all() -> None:
    """A barrier; nothing where there is one process."""
    if world() > 1:
        largest(0)


def device() -> torch.device:
    """Where tensors that processes exchange have to lie."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Job:
    """The job that this process is one of ``world`` processes of."""

    def __init__(self) -> None:
        """Join the job that the environment describes."""
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=300)))
        self.variables = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
        self.variables |= {"LOCAL_RANK": str(self.local)}
        self.bound = 600.0
        """Seconds of silence after which a process counts as lost."""
        self.marks, self.place = 0, "starting"
        self.training = False
        self.idle = False
        self.posted = 0
        interrupt.echo = 5.0
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local)
        me = {"host": platform.node(), "pid": os.getpid()}
        self.store.set(f"who/{self.rank}", json.dumps(me))
        self._stuck: tuple[tuple[int, ...] | None, float] = (None, 0.0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="signs of life")
        self._thread.start()

    # what the first process tells the others

    def post(self, task: dict[str, Any]) -> None:
        """Have every other process do ``task``."""
        self.store.set(f"task/{self.posted}", json.dumps(task))
        self.posted += 1

    def end(self, code: int) -> None:
        """Have every other process end with ``code``."""
        self.store.set("end", str(code))
        self.post({"end": code})

    def leave(self) -> None:
        """Stop the signs of life and the collectives: a thread at work in them at the interpreter's end aborts it."""
        self._over.set()
        self._thread.join(timeout=10)
        if dist.is_initialized():
            dist.destroy_process_group()

    def finished(self) -> None:
        """Note that this process has done its part of the task at hand."""
        self.store.set(f"done/{self.posted}/{self.rank}", "1")

    def wait_for_others(self) -> None:
        """Wait until every other process has done its part of the task posted last."""
        wanted = [f"done/{self.posted}/{other}" for other in range(self.world) if other != self.rank]
        while wanted and not self.store.check(wanted):
            time.sleep(0.1)

    def next_task(self) -> dict[str, Any]:
        """The next task that the first process posts, whenever that is. A signal is handed on to the first process."""
        told, self.idle = False, True
        while not self.store.check([f"task/{self.posted}"]):
            if interrupt.asked() and not told:
                self.store.set("signal", str(interrupt.number()))
                told = True
            time.sleep(0.1)
        task = json.loads(self.store.get(f"task/{self.posted}"))
        self.posted += 1
        self.idle = False
        return dict(task)

    def ended(self, seconds: float) -> int | None:
        """The code that the first process ended with, if it does so within ``seconds``."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.store.check(["end"]):
                return int(self.store.get("end"))
            time.sleep(0.1)
        return None

    # training

    @contextmanager
    def together(self, bound: float) -> Iterator[None]:
        """Within, libraries see all processes; a process without a sign of progress for ``bound`` seconds is lost."""
        self.bound = bound
        os.environ.update(self.variables)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store = distributed_c10d.PrefixStore("processes", self.store)
            # the watch names who is lost; a collective that waits for it any longer ends by itself
            timeout = timedelta(seconds=2 * bound + 60)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        self.mark("loading")
        try:
            yield
        finally:
            self.training = False
            for name in self.variables:
                os.environ.pop(name, None)

    def mark(self, place: str) -> None:
        """Note that this process has come to ``place``."""
        self.marks, self.place = self.marks + 1, place

    # the watch

    def _live(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        ending: float | None = None
        while not self._over.is_set():
            with suppress(dist.DistError):
                self.store.set(f"beat/{self.rank}", f"{time.time()} {self.marks} {int(self.training)} {self.place}")
                if self.store.check(["verdict"]):
                    self._give_up(self.store.get("verdict").decode())
                if self.rank == 0 and self.store.check(["signal"]) and not interrupt.asked():
                    os.kill(os.getpid(), int(self.store.get("signal")))
                if self.rank and not self.idle and self.store.check(["end"]):  # the first has failed on its way
                    ending = ending or time.monotonic()
                    if time.monotonic() > ending + 10:
                        os._exit(int(self.store.get("end")) or interrupt.LOST)
                self._watch(seen)
            self._over.wait(min(BEAT, self.bound / 4))

    def _watch(self, seen: dict[int, tuple[str, float]]) -> None:
        """Look at the others (the first process at all, the others at the first), and give up where one is lost."""
        now = time.monotonic()
        found: dict[int, tuple[int, bool, str]] = {}
        for other in range(self.world) if self.rank == 0 else (0,):
            if not self.store.check([f"beat/{other}"]):
                continue
            text = self.store.get(f"beat/{other}").decode()
            if seen.get(other, ("", 0.0))[0] != text:
                seen[other] = (text, now)
            elif now - seen[other][1] > self.bound and other != self.rank:
                self._judge(f"{self.name(other)} has shown no sign of life for {self.bound:g} s")
            _, marks, training, place = text.split(" ", 3)
            found[other] = (int(marks), training == "1", place)
        if self.rank or len(found) < self.world or not all(training for _, training, _ in found.values()):
            self._stuck = (None, now)
            return
        state = tuple(marks for marks, _, _ in found.values())
        if self._stuck[0] != state:
            self._stuck = (state, now)
        elif now - self._stuck[1] > self.bound:
            last = min(state)
            behind = [other for other, (marks, _, _) in found.items() if marks == last]
            if len(behind) == self.world:
                places = ", ".join(sorted({found[other][2] for other in behind}))
                self._judge(f"no process has come any further for {self.bound:g} s, all of them at {places}")
            names = ", ".join(f"{self.name(other)} (at {found[other][2]})" for other in behind[:4])
            self._judge(f"{names} came no further for {self.bound:g} s, and the others wait for it")

    def _judge(self, text: str) -> None:
        self.store.set("verdict", text)
        self._give_up(text)

    def _give_up(self, text: str) -> None:
        if self.rank == 0 or text.startswith(self.name(0)):
            os.write(2, f"\ndistill: {text}: the job ends; the same command continues\n".encode())
        sys.stdout.flush()
        time.sleep(2 * BEAT)  # the others are to read the verdict before the launcher ends them
        os._exit(interrupt.LOST)

    def name(self, other: int) -> str:
        """``rank 1 (host node7, pid 123)``."""
        if not self.store.check([f"who/{other}"]):
            return f"rank {other}"
        who = json.loads(self.store.get(f"who/{other}"))
        return f"rank {other} (host {who['host']}, pid {who['pid']})"

    def silent(self, seconds: float = 3 * BEAT) -> list[int]:
        """The processes that show no sign of life within ``seconds``."""
        beats = lambda: [self.store.get(f"beat/{other}") for other in range(self.world)]  # noqa: E731
        before = beats()
        time.sleep(seconds)
        return [other for other, (old, new) in enumerate(zip(before, beats(), strict=True)) if old == new]


_job: Job | None = None


def launched() -> bool:
    """Whether a launcher started this process."""
    return _job is not None or {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join() -> Job:
    """This process's job, joined at the first call."""
    global _job
    if _job is None:
        _job = Job()
    return _job


def job() -> Job | None:
    """This process's job; None where it is alone, or where the job was not joined."""
    return _job


def size() -> int:
    """How many processes a training of this job will have."""
    return _job.world if _job is not None else world()


def neighbours() -> int:
    """How many processes of this job share this machine."""
    return int(_job.variables.get("LOCAL_WORLD_SIZE", "1")) if _job is not None else 1


def mark(place: str, *, watched: bool | None = None) -> None:
    """Note that this process has come to ``place``, for the watch; ``watched`` says whether it now has to come on."""
    if _job is not None:
        _job.mark(place)
        _job.training = _job.training if watched is None else watched


def unwatch() -> None:
    """Nothing is expected of this process now but signs of life."""
    mark("outside of the training", watched=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Something that may take long (a checkpoint, held-out losses): until it is over only signs of life count."""
    before = _job.training if _job is not None else False
    unwatch()
    try:
        yield
    finally:
        mark("going on", watched=before)
