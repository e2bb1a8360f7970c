"""Two protocols, prefill, memory by length and running out of it, on engines whose times are known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from distill.config import ThroughputConfig
from distill.errors import UserError
from eval import serving
from eval.machine import Machine
from eval.roofline import Shape
from eval.serving import details
from eval.throughput import headline, measure, turn

MACHINE = Machine("2 CPU threads", copy=1e9, gemm=1e11, memory=1e9)


class Known:
    """An engine whose step takes ``fixed`` seconds and ``each`` for every token of the cache, on a machine on which
    each step of any engine is ``drift`` slower than the one before; with room for ``room`` tokens in all."""

    holds_cache = True
    dtype, device = torch.float32, torch.device("cpu")
    steps = 0

    def __init__(
        self, name: str, shape: Shape, fixed: float, each: float, drift: float = 0.0, room: float = 1e9
    ) -> None:
        self.name, self.shape, self.fixed, self.each, self.drift, self.room = name, shape, fixed, each, drift, room
        self.calls: list[tuple[Any, ...]] = []
        self.batch = 0

    def prepare(self, batch: int, capacity: int) -> None:
        self.release()
        if batch * capacity > self.room:
            raise MemoryError("no room")
        self.calls.append(("prepare", batch, capacity))
        self.batch = batch

    def step(self, context: int) -> float:
        Known.steps += 1
        self.calls.append(("step", context))
        return (self.fixed + self.each * self.batch * context) * (1 + self.drift * Known.steps)

    def generate(self, tokens: int) -> float:
        return sum(self.fixed + self.each * self.batch * context for context in range(1, tokens + 1))

    def prefill(self, batch: int, tokens: int) -> float:
        return 1e-3 * batch * tokens

    def cache_bytes(self, context: int) -> dict[str, int]:
        return {"kv_bytes": self.shape.kv_bytes(self.batch, context), "state_bytes": self.shape.state_bytes(self.batch)}

    def overhead_bytes(self) -> int:
        return 100 * self.batch

    def release(self) -> None:
        self.batch = 0


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "measure", classmethod(lambda cls, *args, **kwargs: MACHINE))


@pytest.fixture
def make(llama: Any, hybrid: Any) -> Any:
    """``make(drift=..., room=...)``: a teacher, and a hybrid whose step grows half as fast."""

    def engines(**options: float) -> dict[str, Known]:
        Known.steps = 0
        return {
            "teacher": Known("teacher", Shape.of(llama), 1.0, 1e-3, **options),
            "hybrid": Known("hybrid", Shape.of(hybrid), 1.0, 5e-4, **options),
        }

    return engines


OPTIONS = ThroughputConfig(batches=[2, 8], contexts=[50], output_tokens=100, repeats=3, lengths=[10, 1000])


def test_equal_batch_and_equal_memory(make: Any) -> None:
    engines = make()
    rows = measure(engines, OPTIONS)
    found = details(engines, rows, OPTIONS)
    speeds = {(row["model"], row["protocol"], row["batch"]): row for row in found["one_in_n_out"]}
    for (name, _, batch), row in speeds.items():
        engine = engines[name]
        engine.batch = batch
        assert row["tokens_per_second"] == pytest.approx(batch * 100 / engine.generate(100)), "the whole sum"
        least = row["roofline_tokens_per_second"]
        assert row["roofline_fraction"] == pytest.approx(row["tokens_per_second"] / least)
    assert [key for key in speeds if key[1] == "equal_batch"] == [
        (name, "equal_batch", batch) for batch in (2, 8) for name in engines
    ]
    cap = next(row["peak_bytes"] for row in rows if (row["model"], row["batch"], row["context"]) == ("teacher", 8, 100))
    wide = [row for row in found["one_in_n_out"] if row["protocol"] == "equal_memory"]
    assert [row["batch"] for row in wide] == [8, engines["hybrid"].shape.largest_batch(100, cap, 100)]
    assert all(row["memory_bytes"] == cap for row in wide) and wide[0]["ratio"] == 1.0
    equal = speeds["hybrid", "equal_batch", 8]
    assert equal["ratio"] == pytest.approx(
        equal["tokens_per_second"] / speeds["teacher", "equal_batch", 8]["tokens_per_second"]
    )
    assert wide[1]["ratio"] > equal["ratio"] > 1
    assert all(row["peak_bytes"] <= cap for row in found["equal_memory"])


def test_a_cap_that_is_given(make: Any) -> None:
    engines, lines = make(), []
    weights = engines["teacher"].shape.weight_bytes
    options = ThroughputConfig(batches=[2], contexts=[], output_tokens=100, repeats=1, memory_gb=weights * 1.02 / 1e9)
    rows = measure(engines, options)
    found = serving.equal_memory(engines, rows, options, MACHINE, lines.append)
    assert {row["model"] for row in found} == set(), "neither fits with a sequence"
    assert [line.split(" in ")[0] for line in lines] == ["teacher does not fit", "hybrid does not fit"]


@pytest.mark.parametrize("batch", range(1, 12))
def test_the_cap_of_a_batch_holds_that_batch(make: Any, batch: int) -> None:
    """Whatever a sequence's share of the overhead is rounded to."""
    shape = make()["teacher"].shape
    for overhead in (7, 13, 1001):
        cap = shape.held_bytes(batch, 100) + overhead
        assert shape.largest_batch(100, cap, overhead / batch) == batch


def test_no_ratio_where_the_first_model_does_not_fit(make: Any) -> None:
    """A hybrid that fits within a cap which is too small for the teacher is not compared with itself."""
    rows = [
        {"model": "hybrid", "protocol": "equal_memory", "batch": 2, "tokens_per_second": 4.0},
        {"model": "teacher", "protocol": "equal_batch", "batch": 2, "tokens_per_second": 2.0},
        {"model": "hybrid", "protocol": "equal_batch", "batch": 2, "tokens_per_second": 3.0},
    ]
    rows = [{**row, "roofline_tokens_per_second": 5.0} for row in rows]
    assert [row["ratio"] for row in serving.with_ratios(rows, "teacher")] == [None, 1.0, 1.5]


def test_a_prefill_that_does_not_fit_is_left_out(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(self: Known, batch: int, tokens: int) -> float:
        if batch > 2:
            raise MemoryError("no room")
        return 1.0

    monkeypatch.setattr(Known, "prefill", narrow)
    lines: list[str] = []
    rows = serving.prefill_rows(make(), OPTIONS, MACHINE, lines.append)
    assert {row["batch"] for row in rows} == {2} and "prefill of 8 x 50: it is left out" in " ".join(lines)


def test_the_order_of_models_does_not_matter(make: Any) -> None:
    """On a machine that gets slower all the time, AB and BA give the same ratio: turns meet the drift alike."""
    ratios = []
    for backwards in (False, True):
        engines = make(drift=1e-3)
        if backwards:
            engines = dict(reversed(engines.items()))
        options = ThroughputConfig(batches=[8], contexts=[], output_tokens=100, repeats=8)
        ratios.append(headline(measure(engines, options), "teacher", "hybrid", options)["ratio"])
    Known.steps = 0
    alone = {name: measure({name: engine}, options) for name, engine in make(drift=1e-3).items()}
    apart = headline([*alone["teacher"], *alone["hybrid"]], "teacher", "hybrid", options)["ratio"]
    assert ratios[0] == pytest.approx(ratios[1], rel=2e-3)
    assert abs(apart / ratios[0] - 1) > 0.01, "one after the other it would have mattered"


def test_turns() -> None:
    assert [turn(["a", "b", "c"], repeat) for repeat in (0, 1)] == [["c", "b", "a"], ["a", "b", "c"]]


def test_running_out_of_memory_halves_the_batch(make: Any) -> None:
    engines, lines = make(room=450), []
    rows = measure(engines, OPTIONS, lines.append)
    assert "out of memory at batch 8: measuring batch 4 in its place" in lines
    assert {row["batch"] for row in rows} == {2, 4}
    assert {row.get("batch_asked") for row in rows if row["batch"] == 4} == {8}
    assert headline(rows, "teacher", "hybrid", OPTIONS)["batch"] == 4
    assert all(engine.batch == 0 for engine in engines.values()), "let go"


def test_not_even_one_sequence_fits(make: Any) -> None:
    with pytest.raises(UserError, match="out of memory even at batch 1: no room\nlower the contexts"):
        measure(make(room=10), OPTIONS)


def test_another_error_is_not_taken_for_memory(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = make()
    monkeypatch.setattr(engines["hybrid"], "step", lambda context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(engines, OPTIONS)
    assert all(engine.batch == 0 for engine in engines.values())


def test_models_that_do_not_fit_together_take_turns(make: Any) -> None:
    """One at a time, round after round, each let go before the next."""
    engines, held = make(), [0]
    for engine in engines.values():
        prepare = engine.prepare

        def alone(batch: int, capacity: int, engine: Known = engine, prepare: Any = prepare) -> None:
            others = [other for other in engines.values() if other is not engine and other.batch]
            if others:
                raise MemoryError("one at a time")
            held[0] += 1
            prepare(batch, capacity)

        engine.prepare = alone  # type: ignore[method-assign]
    lines: list[str] = []
    rows = measure(engines, OPTIONS, lines.append)
    assert not any("out of memory" in line for line in lines)
    assert len(rows) == 2 * 2 * 3 and held[0] == 2 * (1 + 2 * 3), "a try, and both in each of three rounds"


def test_generations_in_full(make: Any) -> None:
    engines, options = make(), ThroughputConfig(batches=[4], contexts=[50], output_tokens=60, repeats=1, full=True)
    found = details(engines, measure(engines, options), options)["one_in_n_out"]
    assert [row["how"] for row in found] == ["full", "full", "sampled", "sampled"]
    for name, row in zip(engines, found, strict=False):
        engines[name].batch = 4
        assert row["tokens_per_second"] == pytest.approx(4 * 60 / engines[name].generate(60))


def test_prefill_and_memory(make: Any) -> None:
    engines = make(room=900)
    options = ThroughputConfig(
        batches=[1, 4], contexts=[8, 32], output_tokens=40, repeats=2, prefill_tokens=64, lengths=[10, 1000]
    )
    found = details(engines, measure(engines, options), options)
    assert [(r["batch"], r["tokens"]) for r in found["prefill"] if r["model"] == "hybrid"] == [(1, 8), (1, 32), (4, 8)]
    assert all(row["tokens_per_second"] == pytest.approx(1000) for row in found["prefill"])
    memory = {(row["model"], row["tokens"]): row for row in found["memory"]}
    assert [row["measured"] for row in memory.values()] == [True, False] * 2, "1,000 tokens do not fit"
    for (name, tokens), row in memory.items():
        shape = engines[name].shape
        assert (row["kv_bytes"], row["state_bytes"]) == (shape.kv_bytes(1, tokens), shape.state_bytes(1))
        assert row["total_bytes"] == shape.held_bytes(1, tokens) + row["overhead_bytes"]
    assert list(found["machine"]) == ["name", "copy_bytes_per_second", "product_flops_per_second", "memory_bytes"]


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_real_models_say_from_where_their_mixers_pay(llama: Any, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.config import MixerConfig
    from distill.hybrid.surgery import hybridize

    models = {"teacher": llama, "hybrid": hybridize(llama, [mixer] + ["attention"] * 3, MixerConfig(bc_norm="always"))}
    options = ThroughputConfig(batches=[1, 64], contexts=[], output_tokens=8, repeats=1, lengths=[16])
    pays = details(models, measure(models, options), options)["pays_from"]
    assert list(pays) == [mixer] and list(pays[mixer]) == ["1", "64"]
    assert all(context >= after for context, after in pairwise(pays[mixer].values())), "weights are read once a batch"
