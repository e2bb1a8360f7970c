"""The trainer: it learns, counts targets over the global batch, resumes to the same bits, says when it fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import TrainerCallback

from distill import interrupt
from distill.checkpoints import checkpoints_of, fault
from distill.config import MixerConfig, TrainConfig
from distill.data.pack import IGNORE, collate
from distill.data.traces import EmbeddedTraces
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.losses import distillation_loss
from distill.storage import DiskFull
from distill.teacher import RememberingTeacher, Teacher
from distill.trainer import DistillTrainer, LanguageTrainer, fit, heldout_loss, training_arguments

Traces = Callable[..., Any]
PLACEMENT = ["mamba1", "attention", "attention", "mamba1"]


class Cut(Exception):
    """What a kill would be."""


class CutAtStep(TrainerCallback):
    """Stop as if killed, once step 5 is logged (the last checkpoint is of step 4)."""

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise Cut


class CutTrainer(DistillTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(CutAtStep())


class WatchedTrainer(DistillTrainer):
    """Notes the step of every micro-batch it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[int] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(self.state.global_step)
        return super().training_step(*args, **kwargs)


def train(
    llama: Any,
    rows: Any,
    output: Path,
    *,
    steps: int,
    trainer: type[DistillTrainer] = DistillTrainer,
    log: Path | None = None,
    **changes: Any,
) -> tuple[Any, DistillTrainer]:
    """Distil H1-2/4 of ``llama``; returns the student and its trainer."""
    options = TrainConfig(**{"batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, **changes})
    student = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).train()
    arguments = training_arguments(options, steps, output, seed=0)
    extra = {"teacher": Teacher(llama), "loss": options.loss, "temperature": options.temperature}
    done = fit(trainer, student, rows, arguments, title="test", log=log, **extra)
    assert isinstance(done, DistillTrainer)
    return student, done


def same_bits(one: Any, other: Any) -> bool:
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def events(log: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "minutes")} for line in lines
    ]


def test_distilling_lowers_the_heldout_loss(llama: Any, traces: Traces, tmp_path: Path) -> None:
    heldout, teacher = traces(8, seed=9, held_out=True), Teacher(llama)
    start = heldout_loss(hybridize(llama, PLACEMENT, MixerConfig()), teacher, heldout, 4, "reverse_kl", 1.0)
    student, _ = train(llama, traces(80), tmp_path / "out", steps=20, log=tmp_path / "log.jsonl")
    end = heldout_loss(student, teacher, heldout, 4, "reverse_kl", 1.0)
    assert 0 < end < 0.8 * start
    log = events(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 21))
    assert [line["tokens"] for line in log] == [4 * 64 * step for step in range(1, 21)]
    assert all(line["grad_norm"] > 0 and line["loss"] > 0 for line in log)


def test_every_parameter_is_trained_and_the_teacher_is_not(llama: Any, traces: Traces, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    start = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).state_dict()
    student, _ = train(llama, traces(8), tmp_path, steps=2)
    for name, parameter in student.named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} did not move"
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_heldout_loss_is_the_mean_over_valid_targets(family: Any, hybrid_family: Any, traces: Traces) -> None:
    """As computed from each family's own logits: what Granite does to its logits is in ours too."""
    llama, hybrid = family, hybrid_family
    rows = traces(6, held_out=True)
    batch = collate([rows[i] for i in range(6)])
    labels = batch.pop("labels")
    with torch.no_grad():
        log_q, log_p = (log_softmax(m(**batch, use_cache=False).logits.double(), -1) for m in (hybrid, llama))
    each = (log_q.exp() * (log_q - log_p)).sum(-1)[:, :-1][labels[:, 1:] != IGNORE]
    values = [heldout_loss(hybrid.train(), Teacher(llama), rows, size, "reverse_kl", 1.0) for size in (1, 4, 6)]
    assert values == pytest.approx([float(each.mean())] * 3, rel=1e-4)
    assert hybrid.training, "the mode is given back"
    nothing_swapped = hybridize(llama, ["attention"] * 4, MixerConfig())
    assert heldout_loss(nothing_swapped, Teacher(llama), rows, 4, "reverse_kl", 1.0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("name", ["granite", "qwen3"])
def test_loss_and_gradients_are_those_of_the_models_own_logits(
    make_model: Callable[..., Any], name: str, loss: str, traces: Traces
) -> None:
    """In chunks from the hidden states, over a vocabulary padded beyond the tokenizer's."""
    teacher = make_model(name, vocab_size=83).double()
    student = hybridize(teacher, PLACEMENT, MixerConfig(), seed=0).double().train()
    batch = collate([traces(4)[i] for i in range(4)])
    labels = batch.pop("labels")
    frozen = Teacher(teacher)
    objective = partial(
        distillation_loss, loss, teacher_hidden=frozen.hidden(batch), teacher_head=frozen.head, labels=labels
    )
    ours = student(**batch, use_cache=False, objective=objective).loss
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(ours, parameters)
    keep = labels[:, 1:] != IGNORE
    log_q, log_p = (log_softmax(m(**batch, use_cache=False).logits, -1)[:, :-1][keep] for m in (student, teacher))
    p, q = (log_p, log_q) if loss == "forward_kl" else (log_q, log_p)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
    for own, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


def test_micro_batches_make_no_difference(llama: Any, traces: Traces, tmp_path: Path) -> None:
    rows = traces(12)
    counts = [int((rows[i]["labels"] != IGNORE).sum()) for i in range(12)]
    assert len(set(counts[:4])) > 1, "equal counts would hide a wrong mean"
    results = []
    for accumulation in (1, 4):
        log = tmp_path / f"{accumulation}.jsonl"
        student, _ = train(
            llama, rows, tmp_path / str(accumulation), steps=3, gradient_accumulation=accumulation, log=log
        )
        results.append((student.state_dict(), events(log)))
    (whole, whole_log), (micro, micro_log) = results
    for one, other in zip(whole_log, micro_log, strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    start = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).state_dict()
    moved = torch.cat([(whole[name] - start[name]).flatten() for name in whole]).norm()
    apart = torch.cat([(whole[name] - micro[name]).flatten() for name in whole]).norm()
    assert apart < 1e-3 * moved


def test_same_seed_same_bits(llama: Any, traces: Traces, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, _ = train(llama, traces(12), tmp_path / "first", steps=3)
    torch.manual_seed(2)
    second, _ = train(llama, traces(12), tmp_path / "second", steps=3)
    assert same_bits(first, second)


def test_resumed_equals_uninterrupted(llama: Any, traces: Traces, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "save_steps": 2, "gradient_accumulation": 2, "weight_decay": 0.1}
    whole, _ = train(llama, traces(32), tmp_path / "whole", log=tmp_path / "whole.jsonl", **options)
    with pytest.raises(Cut):
        train(llama, traces(32), tmp_path / "cut", trainer=CutTrainer, log=tmp_path / "cut.jsonl", **options)
    assert (tmp_path / "cut" / "checkpoint-4").is_dir() and not (tmp_path / "cut" / "checkpoint-6").exists()
    assert events(tmp_path / "cut.jsonl")[-1]["step"] == 5
    torch.manual_seed(99)  # a new process draws its own numbers first
    options |= {"trainer": WatchedTrainer, "log": tmp_path / "cut.jsonl"}
    resumed, trainer = train(llama, traces(32), tmp_path / "cut", **options)
    assert isinstance(trainer, WatchedTrainer)
    assert trainer.seen == [4, 4, 5, 5, 6, 6, 7, 7], "it goes on from the checkpoint"
    assert same_bits(whole, resumed)
    assert events(tmp_path / "cut.jsonl") == events(tmp_path / "whole.jsonl")


OPTIONS: dict[str, Any] = {"steps": 8, "save_steps": 2, "weight_decay": 0.1, "loss": "annealed_kl"}


@pytest.fixture(scope="module")
def uninterrupted(make_llama: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight steps of which nothing came in the way: the weights, the log, and the folder of checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    rows = EmbeddedTraces(tokenizer, 32, 64, {"mod": 1.0, "add": 1.0, "sort": 1.0}, 0)
    student, _ = train(make_llama(), rows, folder / "out", log=folder / "log.jsonl", **OPTIONS)
    return student, events(folder / "log.jsonl"), folder / "out"


def test_checkpoints_are_whole_and_few(uninterrupted: Any) -> None:
    found = checkpoints_of(uninterrupted[2])
    assert list(found) == [8, 6]
    for path in found.values():
        assert fault(path) is None
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
            file.name for file in path.iterdir()
        }
    assert sorted(path.name for path in uninterrupted[2].iterdir()) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("at", [8, 6, 0])
def test_a_damaged_checkpoint_is_passed_over(
    llama: Any, traces: Traces, tmp_path: Path, uninterrupted: Any, capsys: Any, at: int
) -> None:
    """From the last checkpoint (nothing is left to do), from the one before where that is damaged, or from none."""
    whole, log, made = uninterrupted
    out = shutil.copytree(made, tmp_path / "out")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"loss": 0, **event}) + "\n" for event in log))
    damaged = [path for step, path in checkpoints_of(out).items() if step > at]
    for path in damaged:
        content = bytearray((path / "optimizer.pt").read_bytes())
        content[-200] ^= 1
        (path / "optimizer.pt").write_bytes(content)
    torch.manual_seed(99)
    student, _ = train(llama, traces(32), out, log=tmp_path / "log.jsonl", **OPTIONS)
    said = capsys.readouterr().out
    for path in damaged:
        assert f"test: {path} is passed over: optimizer.pt is damaged" in said
    assert (f"test: continuing from {out / f'checkpoint-{at}'}" in said) == (at > 0)
    assert same_bits(whole, student)
    assert events(tmp_path / "log.jsonl") == log
    assert all(fault(path) is None for path in checkpoints_of(out).values())


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_stops_after_a_step_and_its_checkpoint(
    llama: Any, traces: Traces, tmp_path: Path, uninterrupted: Any, number: signal.Signals
) -> None:
    class Signalled(DistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 4:
                os.kill(os.getpid(), number)
            return super().training_step(*args, **kwargs)

    log = tmp_path / "log.jsonl"
    with pytest.raises(interrupt.Stopped) as caught, interrupt.handled():
        train(llama, traces(32), tmp_path / "out", trainer=Signalled, log=log, **OPTIONS)
    assert caught.value.signum == number
    assert list(checkpoints_of(tmp_path / "out")) == [5, 4]
    student, _ = train(llama, traces(32), tmp_path / "out", log=log, **OPTIONS)
    assert same_bits(uninterrupted[0], student)
    assert events(log) == uninterrupted[1]


class SignalAll(TrainerCallback):
    """SIGTERM to the processes that prepare the rows, and then to this one, as a scheduler has it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (2, 5):
            workers = psutil.Process().children()
            assert workers
            every = [str(process.pid) for process in (*workers, psutil.Process())]
            subprocess.run(["kill", "-TERM", *every], check=True)  # from outside: of a parent they take it otherwise


class SignalledTrainer(DistillTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SignalAll())


def test_a_signal_to_all_leaves_the_rows_coming(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """The step is finished and its checkpoint written, at first and after a resumption; nobody is left behind."""
    keys: dict[str, Any] = {"steps": 8, "save_steps": 4, "data_workers": 2, "batch_size": 2}
    for step in (3, 6):
        with interrupt.handled(), pytest.raises(interrupt.Stopped):
            train(llama, traces(16), tmp_path / "out", trainer=SignalledTrainer, log=tmp_path / "log.jsonl", **keys)
        assert next(iter(checkpoints_of(tmp_path / "out"))) == step
        assert not psutil.wait_procs(psutil.Process().children(), timeout=20)[1]
    _, done = train(llama, traces(16), tmp_path / "out", log=tmp_path / "log.jsonl", **keys)
    assert done.state.global_step == 8


def test_a_signal_stops_a_training_of_which_nothing_is_kept_at_once(llama: Any, traces: Traces, tmp_path: Path) -> None:
    class Signalled(DistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the step is finished")

    with pytest.raises(interrupt.Stopped), interrupt.handled():
        train(llama, traces(8), tmp_path / "out", trainer=Signalled, steps=2)
    assert not checkpoints_of(tmp_path / "out")


def test_a_checkpoint_without_room_leaves_the_earlier_ones(
    llama: Any, traces: Traces, tmp_path: Path, uninterrupted: Any
) -> None:
    """The system refuses files as large as the optimizer's from the third checkpoint on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Starved(DistillTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step == 6:
                size = (tmp_path / "out/checkpoint-4/optimizer.pt").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
            super()._save_checkpoint(*args, **kwargs)

    try:
        with pytest.raises(DiskFull, match="cannot write to .*MiB free: too little"):
            train(llama, traces(32), tmp_path / "out", trainer=Starved, log=tmp_path / "log.jsonl", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert all(fault(path) is None for path in checkpoints_of(tmp_path / "out").values())
    student, _ = train(llama, traces(32), tmp_path / "out", log=tmp_path / "log.jsonl", **OPTIONS)
    assert same_bits(uninterrupted[0], student)


def test_what_decays(make_llama: Callable[..., Any], traces: Traces, tmp_path: Path) -> None:
    hybrid = hybridize(make_llama(attention_bias=True, tie_word_embeddings=False), PLACEMENT, MixerConfig())
    arguments = training_arguments(TrainConfig(weight_decay=0.1), 1, tmp_path, 0)
    trainer = LanguageTrainer(model=hybrid, args=arguments, train_dataset=traces(8))
    optimizer = trainer.create_optimizer()
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decay = {name: by_id[id(p)] for name, p in hybrid.named_parameters()}
    assert set(decay.values()) == {0.0, 0.1}
    free = ("A_log", "self_attn.D", "bias", "norm.weight", "layernorm.weight", "embed_tokens.weight", "lm_head.weight")
    for name, value in decay.items():
        assert name.endswith(free) == (value == 0.0), name
    # the two lists above are not empty of what they are about
    mixer, attention = "model.layers.0.self_attn.", "model.layers.1.self_attn."
    for name in ("A_log", "D", "dt_proj.bias", "conv1d.bias", "in_proj.bias", "out_proj.bias"):
        assert decay[mixer + name] == 0.0
    for name in ("in_proj.weight", "out_proj.weight", "dt_proj.weight"):
        assert decay[mixer + name] == 0.1
    assert decay[attention + "q_proj.weight"] == decay["model.layers.0.mlp.down_proj.weight"] == 0.1
    assert decay[attention + "q_proj.bias"] == decay["model.norm.weight"] == decay["lm_head.weight"] == 0.0


def test_mixers_have_their_own_learning_rate(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """With a rate of 0 for all else, one step moves the replaced mixers and nothing else."""
    before = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).state_dict()
    student = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).train()
    arguments = training_arguments(
        TrainConfig(batch_size=4, learning_rate=0.0, warmup_steps=0, weight_decay=0.1), 2, tmp_path, seed=0
    )
    trainer = fit(
        DistillTrainer, student, traces(16), arguments, title="t", log=None, teacher=Teacher(llama),
        loss="reverse_kl", temperature=1.0, mixer_learning_rate=1e-3,
    )  # fmt: skip
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved == {
        name for name in before if name.startswith(("model.layers.0.self", "model.layers.3.self"))
    }
    optimizer: Any = trainer.optimizer.optimizer  # type: ignore[union-attr]
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.1]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(student.parameters()))


def test_annealed_loss_ends_as_reverse_kl(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """The share of reverse KL grows from 0 at the first step to 1 at the last."""
    seen: list[float] = []

    class Watched(DistillTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def watched(**given: Any) -> Any:
                seen.append(given["objective"].keywords["progress"])
                return model(**given)

            return super().compute_loss(watched, inputs, *args, **kwargs)

    train(llama, traces(12), tmp_path, steps=3, trainer=Watched, loss="annealed_kl")
    assert seen == [0.0, 0.5, 1.0]


def test_a_remembering_teacher_answers_the_same(llama: Any, traces: Traces) -> None:
    """From memory where it has room for the batch, computed again where it has not; never for other documents."""
    rows = traces(4)
    batches = [collate([rows[i], rows[i + 1]]) for i in (0, 2)]
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    size = Teacher(llama).hidden(inputs[0]).nbytes
    teacher = RememberingTeacher(llama, limit=size)
    for each in (0, 1, 0, 1):
        assert torch.equal(teacher.hidden(inputs[each]), Teacher(llama).hidden(inputs[each]))
    assert len(teacher.seen) == 1
    shifted = {**inputs[0], "position_ids": torch.arange(inputs[0]["input_ids"].shape[1]).expand(2, -1)}
    assert torch.equal(teacher.hidden(shifted), Teacher(llama).hidden(shifted))


def test_a_loss_that_is_not_finite_stops(llama: Any, traces: Traces, tmp_path: Path) -> None:
    class Poisoned(DistillTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 3:
                with torch.no_grad():
                    model.model.norm.weight.fill_(torch.nan)
            return super().training_step(model, *args, **kwargs)

    with pytest.raises(UserError, match="loss became nan at step 4: lower train.learning_rate"):
        train(llama, traces(32), tmp_path, steps=8, trainer=Poisoned, save_steps=2)
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-4").exists()


def test_a_checkpoint_of_another_placement_is_refused(
    llama: Any, traces: Traces, tmp_path: Path, uninterrupted: Any
) -> None:
    out = shutil.copytree(uninterrupted[2], tmp_path / "out")
    other = hybridize(llama, ["attention", "mamba1", "attention", "mamba1"], MixerConfig())
    arguments = training_arguments(TrainConfig(batch_size=4), 8, out, seed=0)
    extra = {"teacher": Teacher(llama), "loss": "reverse_kl", "temperature": 1.0}
    with pytest.raises(UserError, match="checkpoint-8 is of another placement: blocks 0, 1 have other mixers"):
        fit(DistillTrainer, other, traces(32), arguments, title="t", log=None, **extra)


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size=6 is not divisible by train.gradient_accumulation=4"):
        training_arguments(TrainConfig(batch_size=6, gradient_accumulation=4), 1, tmp_path, 0)


def two_documents(first_seed: int) -> dict[str, torch.Tensor]:
    """A packed row whose targets are all in its second document."""
    rng = torch.Generator().manual_seed(first_seed)
    ids = torch.arange(24) % 50 + 5
    ids[:10] = torch.randint(5, 56, (10,), generator=rng)
    labels = ids.clone()
    labels[:14] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(10), torch.arange(14)])}


def test_documents_do_not_leak_in_the_plain_teachers_training(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """transformers ignores packed position_ids when a cache exists, and a model makes one unless told not to."""
    losses = []
    for use_cache in (False, True):
        llama.config.use_cache = True
        trainer = LanguageTrainer(
            model=llama, args=training_arguments(TrainConfig(), 1, tmp_path, 0), train_dataset=traces(8)
        )
        if use_cache:  # the trap
            llama.config.use_cache = True
        losses.append([trainer.compute_loss(llama.train(), collate([two_documents(i)])).item() for i in (1, 2)])
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1], "the trap is gone: the test shows nothing"


def test_documents_do_not_leak_in_distillation(llama: Any, traces: Traces, tmp_path: Path) -> None:
    student = hybridize(llama, PLACEMENT, MixerConfig()).train()
    llama.config.use_cache = True
    arguments = training_arguments(TrainConfig(), 1, tmp_path, 0)
    extra = {"teacher": Teacher(llama), "loss": "reverse_kl", "temperature": 1.0}
    trainer = DistillTrainer(model=student, args=arguments, train_dataset=traces(8), **extra)
    results = []
    for seed in (1, 2):
        student.config.use_cache = True
        student.zero_grad()
        loss = trainer.compute_loss(student, collate([two_documents(seed)]))
        loss.backward()
        results.append((loss.item(), student.model.layers[0].self_attn.in_proj.weight.grad.clone()))
    assert results[0][0] == results[1][0] > 0
    assert torch.equal(results[0][1], results[1][1])
