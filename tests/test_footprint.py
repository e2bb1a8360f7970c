"""What a step is said to hold, beside what torch's profiler sees it hold at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from distill.config import EngineConfig, MixerConfig, RunConfig, TrainConfig
from distill.data.pack import collate
from distill.footprint import footprint, kept_by_block
from distill.hybrid.surgery import hybridize
from distill.offload import OffloadedTeacher
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments
from stages.cli import main
from stages.plan import counts_of, memory_lines

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"head_dim": 32, "num_hidden_layers": 4}
ROWS = 64


def kept(model: Any, tokens: int) -> int:
    """Bytes that autograd keeps of a forward of one row, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(5, 50, (1, tokens))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("mixer", ["attention", "mamba1", "mamba2"])
@pytest.mark.parametrize("keys", [{}, {"intermediate_size": 96}, {"num_attention_heads": 8, "num_key_value_heads": 8}])
def test_a_block_keeps_what_is_said(make_llama: Callable[..., Any], mixer: str, keys: dict[str, int]) -> None:
    shape = {**WIDE, **keys}
    sizes = []
    for blocks in (2, 4):
        model = make_llama(**{**shape, "num_hidden_layers": blocks})
        hybrid = hybridize(model, [*[mixer] * (blocks - 1), "attention"], MixerConfig())
        sizes.append(kept(hybrid.train(), 256))
    one = (sizes[1] - sizes[0]) / 2
    assert 4 * 256 * kept_by_block(mixer, model.config, 16) == pytest.approx(one, rel=0.02)


def peak(events: Any) -> int:
    """The most that torch's allocator of the CPU held at once, from a profile's memory events."""
    held, most = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(("mixer", "accumulation"), [("attention", 1), ("mamba1", 4), ("mamba2", 1)])
def test_the_peak_of_a_step_is_within_a_fifth(
    make_llama: Callable[..., Any], traces: Callable[..., Any], tmp_path: Path, mixer: str, accumulation: int
) -> None:
    """Of a training from nothing: what there was before (weights of both models) is added to what is allocated."""
    llama = make_llama(**WIDE)
    mixers = [mixer, mixer, "attention", mixer]
    train = TrainConfig(batch_size=16, gradient_accumulation=accumulation, learning_rate=1e-3)
    config = RunConfig(train=train)
    config.data.sequence_length = ROWS
    arguments = training_arguments(train, 3, tmp_path, seed=0)
    student, teacher = hybridize(llama, mixers, config.mixer).train(), Teacher(llama)
    extra: dict[str, Any] = {"teacher": teacher, "loss": "reverse_kl", "temperature": 1.0}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        fit(DistillTrainer, student, traces(48), arguments, title="t", log=None, **extra)
    before = 4 * sum(p.numel() for model in (student, llama) for p in model.parameters())
    measured = before + peak(found.profiler.kineto_results.events())
    line = memory_lines(config, llama.config, mixers, 1)[0]
    told = float(line.split(": ")[1].split(" GB")[0]) * 1e9
    print(f"{mixer}, {accumulation} micro-batches: {told / 1e6:.1f} MB told, {measured / 1e6:.1f} MB measured")
    assert told == pytest.approx(measured, rel=0.2), line


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's run on eight GPUs by DDP, and on enough of them."""
    paper = ["plan", "apriel_h1_15b", "engine.name=ddp", "engine.config=''"]
    assert main([*paper, "slurm.nodes=1"]) == 2
    said = capsys.readouterr().err
    assert "on each of 8 devices (ddp), which have 80 GB" in said
    for part in ("weights", "gradients", "optimizer", "activations", "loss", "teacher"):
        assert part in said
    assert "what would fit:" in said and "engine.name=deepspeed engine.config=zero3" in said
    assert main(["plan", "apriel_h1_15b", "slurm.nodes=3"]) == 2
    assert "train.batch_size=64 rows cannot be shared by 24 processes" in capsys.readouterr().err


SHARED = {
    "zero1": {"optimizer"},
    "zero2": {"optimizer", "gradients"},
    "zero3": {"optimizer", "gradients", "weights"},
    "zero3_offload": {"gradients"},  # the rest is not there at all, but for what is gathered
}


@pytest.mark.parametrize("config", SHARED)
def test_what_a_stage_shares_shrinks_with_the_processes(make_llama: Callable[..., Any], config: str) -> None:
    shape, mixers = make_llama(**WIDE).config, ["mamba1"] * 3 + ["attention"]
    run = RunConfig(train=TrainConfig(batch_size=16), engine=EngineConfig("deepspeed", config))
    counts = counts_of(run, shape, mixers)
    two, eight = (footprint(run, shape, mixers, counts, processes).parts for processes in (2, 8))
    assert {part for part in ("optimizer", "gradients", "weights") if eight[part] < two[part]} == SHARED[config]


def test_the_teacher_takes_what_its_mode_leaves_on_the_device(
    make_llama: Callable[..., Any], traces: Callable[..., Any]
) -> None:
    """Of an offloaded one what its hooks hold at most, beside what is in no block."""
    llama = make_llama(**WIDE)
    mixers = ["mamba1"] * 3 + ["attention"]
    zero3 = EngineConfig("deepspeed", "zero3")

    def told(mode: str, processes: int = 1, engine: EngineConfig | None = None) -> Any:
        run = RunConfig(train=TrainConfig(batch_size=16, teacher_mode=mode), engine=engine or EngineConfig())
        return footprint(run, llama.config, mixers, counts_of(run, llama.config, mixers), processes)

    size = 4 * sum(p.numel() for p in llama.parameters())
    blocks = 4 * sum(p.numel() for p in llama.model.layers.parameters())
    assert told("whole").parts["teacher"] == told("auto").parts["teacher"] == size
    assert told("offline").parts["teacher"] == 0 and not told("offline").host
    assert told("auto", 8, zero3).parts["teacher"] == told("sharded", 8, zero3).parts["teacher"]
    assert size / 8 < told("sharded", 8, zero3).parts["teacher"] < told("sharded", 2, zero3).parts["teacher"]
    teacher, most = OffloadedTeacher(llama, torch.device("cpu")), list[int]()
    held = teacher.prefetch.held
    for block in teacher.prefetch.blocks:
        block.mlp.register_forward_hook(
            lambda *_: most.append(sum(weight.nbytes for each in held.values() for weight in each.values()))
        )
    batch = collate([traces(1)[0]])
    batch.pop("labels")
    teacher.hidden(batch)
    found = told("offload")
    assert found.parts["teacher"] == max(most) + size - blocks
    assert found.host == {"teacher": blocks}


def test_where_the_teacher_could_be_is_part_of_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lean = ["train.gradient_checkpointing=true", "train.gradient_accumulation=2", "train.teacher_mode=whole"]
    assert main(["plan", "apriel_h1_15b", *lean, "plan.device_memory=68"]) == 2
    said = capsys.readouterr().err
    assert "(teacher whole)" in said and "train.teacher_mode=offload (" in said
    assert main(["plan", "apriel_h1_15b", *lean[:2], "train.teacher_mode=offload", "plan.device_memory=68"]) == 0
    said = capsys.readouterr().out
    assert "teacher offload)" in said and "in the CPU's memory for each device: teacher" in said
    assert main(["plan", "apriel_h1_15b", *lean[:2], "train.teacher_mode=offline"]) == 0
    assert "the teacher's logits at most" in capsys.readouterr().out
