"""The compiled step of a whole model is the family's own forward, and leaves to that what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distill.config import MixerConfig
from distill.hybrid import decoding
from distill.hybrid.surgery import hybridize
from distill.ops import block_cpu, chain_cpu
from tests.conftest import FAMILIES, MIXED, MIXERS, random_model

PROMPT, LENGTH = 5, 11


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every block that went through the compiled pass."""
    seen: list[int] = []
    real, chain = block_cpu.rest, chain_cpu._chain

    def rest(*given: Any) -> Any:
        seen.append(1)
        return real(*given)

    def chained(team: Any, hidden: Any, carry: Any, blocks: Any, *given: Any) -> Any:
        seen.extend(len(blocks) * [1])
        return chain(team, hidden, carry, blocks, *given)

    monkeypatch.setattr(block_cpu, "rest", rest)
    monkeypatch.setattr(chain_cpu, "_chain", chained)
    return seen


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(5, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decode(model: Any, mask: Tensor | None = None, cache: Any = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits of every token from a prompt on, and all that the cache then holds."""
    ids, logits = tokens(), []
    cache = DynamicCache(config=model.config) if cache is None else cache
    for begin, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH))]:
        seen = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            seen["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
        output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **seen, **options)
        logits.append(output.logits)
    held: list[Tensor] = []
    for layer in cache.layers:
        mixer = hasattr(layer, "recurrent_states")
        held += [layer.conv_states[0], layer.recurrent_states[0]] if mixer else [layer.keys, layer.values]
    return torch.cat(logits, 1), held


def same(found: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]) -> None:
    scale = want[0].abs().max()
    assert (found[0] - want[0]).abs().max() <= 1e-5 * scale
    for one, other in zip(found[1], want[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def left_padding() -> Tensor:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :2] = mask[2, :4] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mixers", [MIXERS, MIXED, ["mamba2"] * 3 + ["attention"]], ids=["mamba1", "mixed", "mamba2"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "granite"])
def test_it_is_the_familys_own_step(
    family: str, mixers: list[str], padded: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybridize(random_model(family), mixers, MixerConfig(), seed=0).eval()
    mask = left_padding() if padded else None
    found = decode(model, mask)
    assert len(passes) == (LENGTH - PROMPT) * len(mixers)
    monkeypatch.setattr(decoding, "serves", lambda model: False)
    same(found, decode(model, mask))
    assert len(passes) == (LENGTH - PROMPT) * len(mixers)


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "granite"])
def test_a_teacher_takes_it_where_it_is_asked_for(family: str) -> None:
    model, ids = random_model(family), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    logits = decoding.step(model, ids[:, -1:], cache, None, None)
    assert logits is not None
    want = model(ids).logits[:, -1:]
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert cache.get_seq_length() == LENGTH


def adapter(model: Any) -> None:
    class Adapter(nn.Linear):
        pass

    old = model.model.layers[1].mlp.up_proj
    new = Adapter(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[1].mlp.up_proj = new


def hook(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: 2 * output)


def other_forward(model: Any) -> None:
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda states: 2 * type(norm).forward(norm, states)


def hook_on_a_block(model: Any) -> None:
    model.model.layers[2].register_forward_pre_hook(lambda module, args: None)


def other_forward_of_the_backbone(model: Any) -> None:
    backbone = model.model
    backbone.forward = lambda *given, **options: type(backbone).forward(backbone, *given, **options)


def training(model: Any) -> None:
    model.train()


def another_gate(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def double(model: Any) -> None:
    model.double()


def weights_of_another_class(model: Any) -> None:
    class Quantised(Tensor):
        pass

    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised))
    assert type(layer.weight) is Quantised


def strided_norm(model: Any) -> None:
    norm = model.model.norm
    norm.weight.data = torch.stack([norm.weight.data, norm.weight.data], 1)[:, 0]


@pytest.mark.parametrize(
    "change",
    [
        adapter,
        hook,
        other_forward,
        hook_on_a_block,
        other_forward_of_the_backbone,
        training,
        another_gate,
        double,
        strided_norm,
        weights_of_another_class,
    ],
    ids=lambda f: f.__name__,
)
def test_what_it_cannot_do_is_the_familys(
    change: Callable[[Any], None], hybrid: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(hybrid)
    found = decode(hybrid)
    assert not passes
    monkeypatch.setattr(decoding, "serves", lambda model: False)
    same(found, decode(hybrid))


@pytest.mark.parametrize("part", ["in_proj", "out_proj", "dt_proj", "conv1d"])
def test_a_hook_in_a_mixer_leaves_that_mixer_whole(part: str, hybrid: Any, passes: list[int]) -> None:
    calls: list[int] = []
    module = getattr(hybrid.model.layers[0].self_attn, part)
    module.register_forward_hook(lambda *given: calls.append(1))
    decode(hybrid)
    expected = LENGTH - PROMPT + 1
    assert len(calls) == (1 if part == "conv1d" else expected) and passes


def test_blocks_of_other_shapes_are_chains_of_their_own(
    hybrid: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = hybrid.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        layer = getattr(mlp, name)
        layer.weight.data = layer.weight.data[: len(layer.weight) // 2].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, : mlp.down_proj.weight.shape[1] // 2].clone()
    found = decode(hybrid)
    assert len(passes) == (LENGTH - PROMPT) * len(hybrid.model.layers)
    monkeypatch.setattr(decoding, "serves", lambda model: False)
    same(found, decode(hybrid))


@torch.no_grad()
def test_what_is_asked_besides_is_given(hybrid: Any, passes: list[int]) -> None:
    ids, cache = tokens(), DynamicCache(config=hybrid.config)
    hybrid(ids[:, :-1], past_key_values=cache, use_cache=True)
    for options, key in (({"output_hidden_states": True}, "hidden_states"), ({"labels": ids[:, -1:]}, "loss")):
        output = hybrid(ids[:, -1:], past_key_values=cache, use_cache=True, **options)
        assert getattr(output, key) is not None
    assert isinstance(hybrid(ids[:, -1:], past_key_values=cache, use_cache=True, return_dict=False), tuple)
    hybrid(ids[:, -1:], past_key_values=cache, use_cache=False)
    assert not passes
    with torch.enable_grad():
        hybrid(ids[:, -1:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert hybrid.lm_head.weight.grad is not None and not passes


@pytest.mark.parametrize("hybrid", ["granite"], indirect=True)
def test_a_family_of_another_form_is_left_alone(hybrid: Any, passes: list[int]) -> None:
    decode(hybrid)
    assert not passes


@torch.no_grad()
def test_a_window_is_left_to_the_family() -> None:
    model = random_model("mistral", sliding_window=4)
    assert not decoding.serves(model)
    assert not decoding.serves(SimpleNamespace(model=nn.Linear(1, 1), config=model.config))


def test_generation_with_a_static_cache_and_beams_is_what_it_was(
    hybrid: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts() -> list[Any]:
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        ids = tokens()
        static = hybrid.generate(ids, cache_implementation="static", disable_compile=True, **options)
        return [hybrid.generate(ids, **options), hybrid.generate(ids, num_beams=3, **options), static]

    found = texts()
    assert passes
    monkeypatch.setattr(decoding, "serves", lambda model: False)
    assert all(torch.equal(one, other) for one, other in zip(found, texts(), strict=True))
