"""Leave-one-out: a block as the identity, what it costs, and the order of ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import LooConfig, MixerConfig, ScoreConfig, TrainConfig
from distill.errors import UserError
from distill.importance import Setup, Variant, available, scorer
from distill.importance.loo import block_as_identity, order
from distill.teacher import Teacher

IDS = torch.randint(5, 56, (16, 12), generator=torch.Generator().manual_seed(0))


def metric(model: Any, variants: Sequence[Variant]) -> list[dict[str, float]]:
    """``agreement`` of every variant."""
    figures = []
    for variant in variants:
        with variant():
            figures.append(agreement(model))
    return figures


@torch.no_grad()
def agreement(model: Any) -> dict[str, float]:
    """How often the model's first choice is the first choice of the unharmed one (kept in ``agreement.wanted``)."""
    logits = model(IDS, use_cache=False).logits
    wanted = getattr(agreement, "wanted", None)
    if wanted is None:
        wanted = agreement.wanted = logits.argmax(-1)  # type: ignore[attr-defined]
    accuracy = float((logits.argmax(-1) == wanted).double().mean())
    right = float(logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).mean())
    return {"accuracy": accuracy, "stderr": 0.01, "loglikelihood": right, "questions": float(wanted.numel())}


@pytest.fixture(autouse=True)
def _fresh_metric() -> None:
    agreement.__dict__.clear()


def make_setup(model: Any, blocks: list[int], tmp_path: Path, report: Callable[..., None] = lambda *_: None) -> Setup:
    return Setup(
        model=model,
        teacher=Teacher(model),
        blocks=blocks,
        metric=metric,
        rows=None,
        heldout=None,
        config=ScoreConfig(loo=LooConfig(task="stub")),
        train=TrainConfig(),
        mixer=MixerConfig(),
        seed=0,
        kernels="auto",
        dtype="float32",
        scratch=tmp_path,
        report=report,
    )


@torch.no_grad()
def test_identity_passes_the_hidden_states_through_and_is_undone(hybrid_family: Any) -> None:
    before = hybrid_family(IDS, use_cache=False).logits
    for block in range(4):
        with block_as_identity(hybrid_family, block):
            output = hybrid_family(IDS, use_cache=False, output_hidden_states=True)
            assert not torch.allclose(output.logits, before, atol=1e-3)
        assert torch.equal(hybrid_family(IDS, use_cache=False).logits, before)
    with pytest.raises(RuntimeError, match="inside"), block_as_identity(hybrid_family, 2):
        raise RuntimeError("inside")
    assert torch.equal(hybrid_family(IDS, use_cache=False).logits, before)


@torch.no_grad()
def test_identity_is_the_model_without_the_block(llama: Any) -> None:
    with block_as_identity(llama, 2):
        skipped = llama(IDS, use_cache=False).logits
    del llama.model.layers[2]
    llama.config.num_hidden_layers = 3
    assert torch.equal(skipped, llama(IDS, use_cache=False).logits)


def test_a_block_out_of_range_is_an_error(llama: Any) -> None:
    for block in (4, -1):
        with (
            pytest.raises(ValueError, match=rf"expected a block in \[0, 4\), got {block}"),
            block_as_identity(llama, block),
        ):
            pass


def test_a_block_that_does_nothing_scores_exactly_zero(llama: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        llama.model.layers[2].self_attn.o_proj.weight.zero_()
        llama.model.layers[2].mlp.down_proj.weight.zero_()
    reported: list[int] = []
    result = scorer("loo")(make_setup(llama, [0, 1, 2, 3], tmp_path, lambda block, row: reported.append(block)))
    rows = {row["block"]: row for row in result["blocks"]}
    assert rows[2]["score"] == 0.0
    assert all(rows[block]["score"] > 0.01 for block in (0, 1, 3))
    assert result["order"][0] == 2 and sorted(result["order"]) == [0, 1, 2, 3]
    assert reported == [0, 1, 2, 3]
    assert result["baseline"] == 1.0 and result["questions"] == IDS.numel() and result["metric"] == "stub"
    assert all(row["score"] == pytest.approx(result["baseline"] - row["value"]) for row in result["blocks"])


def test_shared_prefixes_change_no_score(hybrid_family: Any, tmp_path: Path) -> None:
    """Going on from the recorded inputs gives the figures of the whole model with the block left out."""
    model = hybrid_family
    result = scorer("loo")(make_setup(model, [0, 1, 2, 3], tmp_path))
    for row in result["blocks"]:
        with block_as_identity(model, row["block"]):
            figures = agreement(model)
        assert (row["value"], row["loglikelihood"]) == (figures["accuracy"], figures["loglikelihood"])


def test_shared_prefixes_run_only_the_blocks_above(llama: Any, tmp_path: Path) -> None:
    ran = [0] * 4
    for block, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_hook(lambda *_, block=block: ran.__setitem__(block, ran[block] + 1))
    scorer("loo")(make_setup(llama, [0, 1, 2, 3], tmp_path))
    assert ran == [1, 2, 3, 4]  # the recording pass, and the candidates below each block


def test_scoring_leaves_the_model_as_it_was(hybrid: Any, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    first = scorer("loo")(make_setup(hybrid, [1, 2], tmp_path))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in hybrid.state_dict().items())
    assert [row["block"] for row in first["blocks"]] == [1, 2]
    assert scorer("loo")(make_setup(hybrid, [1, 2], tmp_path)) == first


def row(block: int, score: float, loglikelihood: float, stderr: float = 0.02) -> dict[str, float]:
    return {"block": block, "score": score, "loglikelihood": loglikelihood, "stderr": stderr}


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(0, 0.3, -1), row(1, 0.1, -1), row(2, 0.2, -1)], [1, 2, 0]),  # no ties
        ([row(0, 0.10, -3), row(1, 0.11, -1), row(2, 0.12, -2)], [1, 2, 0]),  # all within one standard error
        ([row(0, 0.10, -3), row(1, 0.11, -1), row(2, 0.13, -0.5)], [1, 0, 2]),  # the last is beyond it
        # a chain: 0.13 ties with 0.115 but not with the least important one not yet placed
        ([row(0, 0.10, -3), row(1, 0.115, -2), row(2, 0.13, -1), row(3, 0.145, -0.5)], [1, 0, 3, 2]),
        ([row(1, 0.1, -1), row(0, 0.1, -1)], [0, 1]),  # equal in everything: by index
        ([row(0, -0.05, -9), row(1, 0.0, -1)], [0, 1]),  # removing a block may help
        ([row(0, float("nan"), -1)], [0]),  # no order, and no end either if nobody looked
    ],
)
def test_order(rows: list[dict[str, float]], wanted: list[int]) -> None:
    assert order(rows) == wanted
    assert order(rows[::-1]) == wanted


def test_unknown_score_names_the_nearest() -> None:
    assert {"loo", "mmr"} <= set(available())
    with pytest.raises(UserError, match="unknown importance score 'lo'.*did you mean 'loo'"):
        scorer("lo")
