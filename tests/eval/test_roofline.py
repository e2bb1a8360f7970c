"""The roofline of a decoder by hand, its bytes beside real caches, what it says of the paper's shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import MixerConfig, RunConfig, ThroughputConfig
from distill.config_merge import load_config
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from eval.machine import DEVICES, Machine, named
from eval.roofline import Shape, pays_from, shapes_of
from eval.shapes import check_blocks, predicted, random_models
from stages.plan import teacher_config
from stages.targets import config_path

SLOW = Machine("slow", copy=1.0, gemm=float("inf"))  # a second a byte
HARD = Machine("hard", copy=float("inf"), gemm=1.0)  # a second a flop
HIDDEN, HEADS, KV, WIDTH, MLP, LAYERS, VOCAB = 48, 4, 2, 32, 64, 4, 64
INNER, KEYS = HEADS * WIDTH, KV * WIDTH


def test_a_step_of_a_teacher_by_hand(llama: Any) -> None:
    """Bytes and flops of every operator at batch 3 and context 100, written out."""
    shape, batch, context = Shape.of(llama), 3, 100
    products = [(HIDDEN, INNER), (HIDDEN, KEYS), (HIDDEN, KEYS), (INNER, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP)]
    products = [*products, (MLP, HIDDEN)] * LAYERS + [(HIDDEN, VOCAB)]
    nbytes = sum(4 * (a * b + batch * (a + b)) for a, b in products)
    nbytes += (2 * LAYERS + 1) * 2 * 4 * batch * HIDDEN + LAYERS * 3 * 4 * batch * MLP  # norms, gates
    nbytes += LAYERS * 2 * 4 * batch * context * KEYS
    assert shape.step(batch, context, SLOW) == pytest.approx(nbytes)
    flops = sum(2 * batch * a * b for a, b in products) + LAYERS * 4 * batch * context * INNER
    assert shape.step(batch, context, HARD) == pytest.approx(flops)
    assert shape.parameters == llama.num_parameters() and shape.weight_bytes == 4 * shape.parameters


def test_the_slower_of_bytes_and_flops_counts_operator_by_operator(llama: Any) -> None:
    both = Machine("both", copy=1.0, gemm=1.0)
    shape = Shape.of(llama)
    least = max(shape.step(3, 100, SLOW), shape.step(3, 100, HARD))
    assert least < shape.step(3, 100, both) < shape.step(3, 100, SLOW) + shape.step(3, 100, HARD)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_mixer_reads_and_writes_its_states(llama: Any, mixer: str) -> None:
    shape = Shape.of(hybridize(llama, [mixer, "attention", "attention", mixer], MixerConfig()))
    held = {"mamba1": INNER * (16 + 3), "mamba2": INNER * (WIDTH + 3 * 3)}[mixer]
    assert shape.state_bytes(5) == 5 * 2 * held * 4
    assert shape.kv_bytes(5, 10) == 5 * 2 * 2 * 10 * KEYS * 4
    grows = shape.step(5, 1000, SLOW) - shape.step(5, 0, SLOW)
    assert grows == pytest.approx(shape.kv_bytes(5, 1000)), "two blocks' keys and values, and nothing else"


def test_prefill_does_more_work_a_byte_than_decoding(llama: Any) -> None:
    shape, machine = Shape.of(llama), Machine("m", copy=1e9, gemm=1e11)
    assert shape.prefill(1, 256, machine) < 256 * shape.step(1, 256, machine) / 4
    one, two = (shape.prefill(batch, 64, HARD) for batch in (1, 2))
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize("memory", [0.0, 1e4, 1e5, 1e6, 3e6, 1e8])
def test_the_largest_batch_is_the_last_that_fits(llama: Any, memory: float) -> None:
    shape = Shape.of(hybridize(llama, ["mamba1"] + ["attention"] * 3, MixerConfig()))
    batch = shape.largest_batch(100, memory, overhead=50.0)
    fits = lambda b: shape.held_bytes(b, 100) + 50.0 * b <= memory  # noqa: E731
    assert not fits(batch + 1) and (batch == 0 or fits(batch))


def test_a_block_pays_from_where_its_roofline_crosses() -> None:
    config = teacher_config(load_config(RunConfig, config_path("apriel_h1_15b")))
    machine, options = DEVICES["h100"], MixerConfig()
    found = {}
    for mixer in ("mamba1", "mamba2"):
        attention, mixed = shapes_of(config, (0, 1), (mixer,), options, 2).values()
        for batch, context in zip(
            (1, 64), pays_from(config, mixer, options, machine, (1, 64), 2).values(), strict=True
        ):
            assert context is not None
            assert mixed.step(batch, context, machine) < attention.step(batch, context, machine)
            assert mixed.step(batch, context - 1, machine) >= attention.step(batch, context - 1, machine)
            found[mixer, batch] = context
    assert found["mamba1", 64] < found["mamba1", 1] < found["mamba2", 1], "more parameters have to be read first"


def test_the_prediction_of_the_papers_shape() -> None:
    """1 in, 16k out on an H100, each model at its largest batch: the paper measured 2.1 and 3.4 times the teacher."""
    config = load_config(RunConfig, config_path("apriel_h1_15b"))
    options = ThroughputConfig(batches=[64], contexts=[4096], output_tokens=16384, prefill_tokens=0, lengths=[16384])
    mixers = ("mamba1", "mamba2")
    found = predicted(teacher_config(config), (0, 30, 40), mixers, config.mixer, options, DEVICES["h100"], 2)
    ratios = {(r["model"], r["protocol"]): r["ratio"] for r in found["serving"]["one_in_n_out"]}
    for mixer in mixers:
        thirty, forty = f"H1-30/50 {mixer}", f"H1-40/50 {mixer}"
        assert ratios[thirty, "equal_memory"] == pytest.approx(2.1, rel=0.2)
        assert ratios[forty, "equal_memory"] == pytest.approx(3.4, rel=0.4)
        for name in (thirty, forty):
            assert ratios[name, "equal_batch"] < ratios[name, "equal_memory"]
    cache = {row["model"]: row["kv_bytes"] for row in found["serving"]["memory"]}
    assert cache["teacher"] == 2 * 50 * 8 * 128 * 2 * 16384 and cache["H1-40/50 mamba1"] == cache["teacher"] / 5
    assert not any(row["measured"] for row in found["serving"]["memory"])


def test_more_output_pays_more(llama: Any) -> None:
    ratios = []
    for tokens in (64, 1024, 16384):
        options = ThroughputConfig(batches=[32], contexts=[], output_tokens=tokens, prefill_tokens=0, memory_gb=80)
        found = predicted(llama.config, (0, 2), ("mamba1",), MixerConfig(), options, DEVICES["h100"], 2)
        ratios.append([r["ratio"] for r in found["serving"]["one_in_n_out"] if r["protocol"] == "equal_batch"][1])
    assert ratios == sorted(ratios)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])
def test_random_models_are_whole_and_share_what_they_can(name: str, make_model: Any) -> None:
    config = make_model(name).config
    models = random_models(config, [0, 2, 3], ["mamba1", "mamba2"], MixerConfig(), torch.float32, "cpu")
    assert list(models) == ["teacher", *(f"H1-{h}/4 {m}" for m in ("mamba1", "mamba2") for h in (2, 3))]
    ids = torch.randint(5, 56, (2, 9))
    for key, model in models.items():
        assert model(ids, use_cache=False).logits.isfinite().all()
        assert not any(parameter.is_meta for parameter in model.parameters())
        shape = shapes_of(config, (0, 2, 3), ("mamba1", "mamba2"), MixerConfig(), 4)[key]
        assert Shape.of(model) == shape, "as on the meta device"
    teacher, two, three = (models[key].model for key in ("teacher", "H1-2/4 mamba1", "H1-3/4 mamba1"))
    assert two.embed_tokens is teacher.embed_tokens and two.layers[3].mlp is teacher.layers[3].mlp
    assert two.layers[3].self_attn is three.layers[3].self_attn is not teacher.layers[3].self_attn


@pytest.mark.parametrize("h", [-1, 4, 50])
def test_at_least_one_block_keeps_attention(h: int) -> None:
    with pytest.raises(UserError, match=rf"h={h} must be in \[0, 4\)"):
        check_blocks([0, h], 4)
    assert check_blocks([3, 1, 1], 4) == [0, 1, 3]


def test_named_devices() -> None:
    assert named("H100").memory == 80e9 and not named("h100").measured
    with pytest.raises(UserError, match="unknown device 'h10'.*did you mean 'h100'"):
        named("h10")
    for machine in DEVICES.values():
        assert machine.copy < machine.gemm and machine.memory >= 24e9


def test_this_machine_is_measured() -> None:
    machine = Machine.measure()
    assert 1e8 < machine.copy < 1e13 and 1e9 < machine.gemm < 1e16 and machine.memory > 1e8
    assert Machine.measure() is machine and named("this") is machine
    assert machine.seconds(flops=machine.gemm, nbytes=machine.copy / 2) == 1.0
