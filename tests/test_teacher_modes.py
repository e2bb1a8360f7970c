"""Where the frozen teacher is: offloaded block by block, or offline, its top-k logits written once and read back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import stored_logits
from distill.config import EngineConfig, MixerConfig, TrainConfig
from distill.data.pack import collate
from distill.engine import check_teacher_mode
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.losses import distillation_loss, valid_targets
from distill.offline import OfflineTeacher, write_logits
from distill.offload import OffloadedTeacher
from distill.stored_logits import Shards, compress, key_of
from distill.teacher import Teacher
from distill.trainer import heldout_loss

Traces = Callable[..., Any]
MIXERS = ["mamba2", "attention", "mamba1", "attention"]
SIZE = 2  # rows a file


def write(teacher: Teacher, rows: Any, folder: Path, k: int = 8) -> None:
    folder.mkdir(exist_ok=True)
    write_logits(teacher, rows, folder, k=k, batch_size=SIZE, report=lambda done, all_of_them: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("blocks", [1, 4])
def test_an_offloaded_teacher_is_the_teacher(make_llama: Callable[..., Any], traces: Traces, blocks: int) -> None:
    """Bit for bit, batch after batch; no more than two blocks are on the device, and all are home again."""
    inputs = [collate([traces(6)[i], traces(6)[i + 1]]) for i in range(3)]
    for batch in inputs:
        batch.pop("labels")
    expected = [Teacher(make_llama(num_hidden_layers=blocks)).hidden(batch) for batch in inputs]
    teacher = OffloadedTeacher(make_llama(num_hidden_layers=blocks), torch.device("cpu"))
    prefetch, seen = teacher.prefetch, []
    for number, block in enumerate(prefetch.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: seen.append((number, sorted(prefetch.held))))
    for batch, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(teacher.hidden(batch), wanted)
    assert seen == [(n, sorted({n, (n + 1) % blocks})) for n in range(blocks)] * 3, "the block that runs, and the next"
    for block, home in zip(prefetch.blocks, prefetch.home, strict=True):
        assert all(parameter.data_ptr() == home[name].data_ptr() for name, parameter in block.named_parameters())


@pytest.mark.gpu
def test_an_offloaded_teacher_computes_on_the_gpu(make_llama: Callable[..., Any], traces: Traces) -> None:
    inputs = {name: tensor.cuda() for name, tensor in collate([traces(2)[0], traces(2)[1]]).items()}
    inputs.pop("labels")
    expected = Teacher(make_llama().cuda()).hidden(inputs)
    teacher = OffloadedTeacher(make_llama())
    for _ in range(3):
        assert torch.equal(teacher.hidden(inputs), expected)


def test_an_offloaded_teacher_lets_go_of_a_block_that_failed(make_llama: Callable[..., Any]) -> None:
    teacher = OffloadedTeacher(make_llama(), torch.device("cpu"))
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "position_ids": torch.arange(4)[None]}
    wanted = teacher.hidden(batch)

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = teacher.prefetch.blocks[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        teacher.hidden(batch)
    handle.remove()
    assert torch.equal(teacher.hidden(batch), wanted)


def test_what_is_stored_is_the_likeliest_and_the_rest() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 40)
    tokens, log_probs, rest = compress(logits, 6)
    p = logits.softmax(-1)
    torch.testing.assert_close(log_probs.exp(), p.topk(6, -1).values)
    torch.testing.assert_close(p.gather(1, tokens), log_probs.exp())
    torch.testing.assert_close(log_probs.exp().sum(-1) + rest.exp(), torch.ones(5))
    *_, nothing = compress(logits, 40)
    assert (nothing == -math.inf).all(), "all are kept"


@pytest.mark.parametrize("loss", ["reverse_kl", "0.5 forward_kl + jsd"])
def test_with_every_logit_stored_the_loss_is_the_teachers(
    llama: Any, traces: Traces, tmp_path: Path, loss: str
) -> None:
    """Up to float16; with fewer it is off by more, the fewer the more."""
    rows, teacher = traces(4), Teacher(llama)
    student = hybridize(llama, MIXERS, MixerConfig(), seed=0)
    vocabulary = llama.config.vocab_size
    exact = heldout_loss(student, teacher, rows, 2, loss)
    gaps = []
    for k in (vocabulary, vocabulary // 2, 1):
        write(teacher, rows, tmp_path / str(k), k)
        gaps.append(abs(heldout_loss(student, OfflineTeacher(tmp_path / str(k), vocabulary), rows, 4, loss) - exact))
    assert gaps[0] < 2e-3 * exact
    assert gaps[0] < gaps[1] < gaps[2]


def test_stored_logits_are_put_together_in_the_order_of_the_targets(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """Rows of several files, in another order and in other batches; some of their targets left out."""
    rows, teacher = traces(6), Teacher(llama)
    write(teacher, rows, tmp_path, k=5)
    batch = collate([rows[i] for i in (5, 0, 3)])
    labels = batch.pop("labels")
    labels[0] = labels[1, :20] = -100  # as a process has it that shares what is left of held-out rows
    stored = OfflineTeacher(tmp_path, llama.config.vocab_size).hidden(batch).logits(labels)
    kept, _ = valid_targets(teacher.hidden(batch), labels)
    exact = teacher.head(kept).log_softmax(-1)
    found = stored(slice(0, len(kept)))
    assert found.shape == exact.shape and len(found)
    top = exact.topk(5, -1)
    torch.testing.assert_close(found.gather(1, top.indices), top.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)), rtol=1e-2, atol=1e-2)
    assert torch.equal(stored(slice(2, 4)), found[2:4])
    assert torch.equal(stored(slice(2, 4), slice(3, 50)), found[2:4, 3:50])  # a part of the vocabulary


def test_gradients_of_an_offline_teacher_reach_the_student(llama: Any, traces: Traces, tmp_path: Path) -> None:
    """Those of autograd against the same approximate distribution."""
    rows = traces(2)
    write(Teacher(llama), rows, tmp_path, k=4)
    batch = collate([rows[0], rows[1]])
    labels = batch.pop("labels")
    stored = OfflineTeacher(tmp_path, llama.config.vocab_size).hidden(batch)
    head = torch.nn.Linear(8, llama.config.vocab_size, bias=False)
    hidden = torch.randn(*labels.shape, 8, requires_grad=True)
    ours = distillation_loss("reverse_kl", hidden, head, stored, None, labels)
    kept, targets = valid_targets(hidden, labels)
    log_q = head(kept).log_softmax(-1)
    log_p = stored.logits(labels)(slice(0, len(targets))).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(ours, expected)
    for own, other in zip(
        *(torch.autograd.grad(loss, [hidden, head.weight]) for loss in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("call", ["write_table", "write_json"])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    llama: Any, traces: Traces, tmp_path: Path, call: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a file is in place, and when it is and is not noted yet; what is whole is not made again."""
    rows, teacher = traces(6), Teacher(llama)
    write(teacher, rows, tmp_path / "whole")
    half, calls = tmp_path / "half", []
    module = stored_logits.pq if call == "write_table" else stored_logits
    real = getattr(module, call)

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, call, killed)
        write(teacher, rows, half)
    if after == 2:  # and one that was noted is cut short
        file = half / "000000.parquet"
        file.write_bytes(file.read_bytes()[:-1])
    write(teacher, rows, half)
    found = contents(half)
    assert {name: found[name] for name in contents(tmp_path / "whole")} == contents(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in half.iterdir()}
    write(teacher, rows, half)
    assert {path: path.stat().st_mtime_ns for path in half.iterdir()} == before


def test_rows_and_targets_that_were_not_written_are_refused(llama: Any, traces: Traces, tmp_path: Path) -> None:
    rows, teacher = traces(2), Teacher(llama)
    write(teacher, rows, tmp_path / "logits")
    offline = OfflineTeacher(tmp_path / "logits", llama.config.vocab_size)
    batch = collate([rows[0]])
    labels = batch.pop("labels")
    with pytest.raises(UserError, match="other targets"):
        offline.hidden(batch).logits(torch.ones_like(labels))
    batch["input_ids"] = batch["input_ids"] + 1
    with pytest.raises(UserError, match="no logits of a row of this training"):
        offline.hidden(batch)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="run 'distill cache'"):
        Shards(tmp_path / "empty")


def test_a_row_is_known_by_its_tokens_and_documents() -> None:
    tokens, positions = torch.arange(6), torch.arange(6)
    split = torch.tensor([0, 1, 2, 0, 1, 2])
    assert key_of(tokens, positions) == key_of(tokens.int(), positions.clone())
    assert len({key_of(tokens, positions), key_of(tokens, split), key_of(tokens + 1, positions)}) == 3


def test_a_mode_that_cannot_be_is_refused() -> None:
    zero3 = EngineConfig(name="deepspeed", config="zero3")
    for mode in ("auto", "whole", "offload", "offline"):
        check_teacher_mode(TrainConfig(teacher_mode=mode), EngineConfig())
    check_teacher_mode(TrainConfig(teacher_mode="sharded"), zero3)
    with pytest.raises(UserError, match="did you mean 'offline'"):
        check_teacher_mode(TrainConfig(teacher_mode="ofline"), EngineConfig())
    with pytest.raises(UserError, match="engine.config=zero3"):
        check_teacher_mode(TrainConfig(teacher_mode="sharded"), EngineConfig())
    with pytest.raises(UserError, match="has no teacher"):
        check_teacher_mode(TrainConfig(teacher_mode="offline"), None)
