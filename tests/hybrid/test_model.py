"""The hybrid model: the teacher when nothing is swapped, and the same figures whichever way tokens come in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.documents import packed_starts, read_padding
from distill.hybrid.surgery import hybridize
from distill.mixers import ATTENTION

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences, and the same as one left-padded batch with its mask."""
    alone = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.full(
        (len(lengths), max(lengths)), 7
    )  # not the pad token, whose embedding is zero and would show nothing
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(alone):
        ids[row, -sequence.shape[1] :] = sequence
        mask[row, -sequence.shape[1] :] = 1
    return alone, ids, mask


@torch.no_grad()
def test_nothing_swapped_is_the_teacher_bit_for_bit(family: Any) -> None:
    hybrid = hybridize(family, [ATTENTION] * 4, MixerConfig())
    ids = tokens(2, 17)
    assert torch.equal(hybrid(ids).logits, family(ids).logits)
    _, padded, mask = left_padded([11, 4])
    assert torch.equal(hybrid(padded, attention_mask=mask).logits, family(padded, attention_mask=mask).logits)
    positions = torch.cat([torch.arange(9), torch.arange(8)]).expand(2, -1)
    packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert torch.equal(hybrid(**packed).logits, family(**packed).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(hybrid.generate(ids, **options), family.generate(ids, **options))


@torch.no_grad()
def test_nothing_swapped_is_the_teacher_in_bf16(family: Any, tmp_path: Path) -> None:
    """Loaded as load_model does: the weights are bf16, RoPE's frequencies are not."""
    family.save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    hybrid = hybridize(teacher, [ATTENTION] * 4, MixerConfig())
    ids = tokens(2, 17)
    assert torch.equal(hybrid(ids).logits, teacher(ids).logits)


@torch.no_grad()
def test_a_swapped_block_changes_the_logits(family: Any, hybrid_family: Any) -> None:
    ids = tokens(2, 17)
    assert not torch.allclose(hybrid_family(ids).logits, family(ids).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(family: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    family.save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype).eval()
    hybrid = hybridize(teacher, ["mamba1", ATTENTION, ATTENTION, "mamba1"], MixerConfig(mil_layout="faithful"))
    for block in (0, 3):  # values that bf16 cannot hold
        hybrid.model.layers[block].self_attn.A_log.add_(1e-4)
        hybrid.model.layers[block].self_attn.D.sub_(1e-4)
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=dtype).eval()
    assert type(loaded) is type(hybrid)
    assert loaded.config.mixers == hybrid.config.mixers and loaded.config.mixer_config == hybrid.config.mixer_config
    weights = loaded.state_dict()
    for name, tensor in hybrid.state_dict().items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
        fp32 = dtype == torch.float32 or name.endswith(("A_log", "self_attn.D"))
        assert weights[name].dtype == (torch.float32 if fp32 else torch.bfloat16), name
    files = {path.suffix for path in (tmp_path / "hybrid").iterdir()}
    assert ".safetensors" in files and not files & {".bin", ".pt", ".py"}
    assert torch.equal(loaded(tokens(2, 17)).logits, hybrid(tokens(2, 17)).logits)


@torch.no_grad()
def test_chunked_prefill_and_decoding_equal_prefill(hybrid_family: Any) -> None:
    ids = tokens(2, 19)
    whole = hybrid_family(ids).logits
    for cuts in ([7, 12], [1, 18], [2, 1, 3, 13], [1] * 19):
        cache, parts = DynamicCache(config=hybrid_family.config), []
        for part in ids.split(cuts, dim=1):
            parts.append(hybrid_family(part, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", [False, True])
def test_left_padded_batch_equals_each_alone(hybrid_family: Any, positions: bool) -> None:
    alone, ids, mask = left_padded([13, 6, 1, 9])
    # without position_ids, RoPE sees shifted positions, which relative positions do not mind
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    batch = hybrid_family(ids, attention_mask=mask, **extra).logits
    for row, sequence in enumerate(alone):
        torch.testing.assert_close(batch[row, -sequence.shape[1] :], hybrid_family(sequence).logits[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[5, 8], [9, 4], [4, 1, 8], [1] * 13])
def test_left_padded_batch_in_chunks_equals_each_alone(hybrid_family: Any, cuts: list[int]) -> None:
    """A row may begin (its padding end) anywhere: within a chunk, at its start, or with a chunk of one token."""
    alone, ids, mask = left_padded([13, 4, 9])
    cache, parts, seen = DynamicCache(config=hybrid_family.config), [], 0
    for part in ids.split(cuts, dim=1):
        seen += part.shape[1]
        output = hybrid_family(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
    batch = torch.cat(parts, 1)
    for row, sequence in enumerate(alone):
        torch.testing.assert_close(batch[row, -sequence.shape[1] :], hybrid_family(sequence).logits[0], **CLOSE)


@torch.no_grad()
def test_left_padded_generation_equals_each_alone(hybrid_family: Any) -> None:
    alone, ids, mask = left_padded([12, 5, 8])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = hybrid_family.generate(ids, attention_mask=mask, **options)
    for row, sequence in enumerate(alone):
        expected = hybrid_family.generate(sequence, attention_mask=torch.ones_like(sequence), **options)
        assert batch[row, -8:].tolist() == expected[0, -8:].tolist()


SHAPES: list[dict[str, Any]] = [
    {"head_dim": 8, "num_key_value_heads": 4},
    {"head_dim": 8, "num_key_value_heads": 1},
    {"head_dim": 16, "num_key_value_heads": 2, "hidden_size": 24},
    {"head_dim": 80, "num_key_value_heads": 2},
    {"head_dim": 96, "num_key_value_heads": 1},
    {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
    {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(str(value) for value in shape.values()))
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_shape_of_heads(make_model: Callable[..., Any], name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    """MHA, GQA and MQA, with heads * head_dim beside the hidden size."""
    teacher, ids = make_model(name, **shape), tokens(2, 11)
    assert torch.equal(hybridize(teacher, [ATTENTION] * 4, MixerConfig())(ids).logits, teacher(ids).logits)
    hybrid = hybridize(teacher, ["mamba1", ATTENTION, ATTENTION, "mamba1"], MixerConfig())
    whole, cache = hybrid(ids).logits, DynamicCache(config=hybrid.config)
    parts = [hybrid(part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    hybrid.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, whole)


@pytest.mark.parametrize(("head_dim", "fits"), [(24, "2, 3, 4, 6, 8, 12, 24"), (20, "2, 4, 5, 10, 20")])
def test_a_head_that_the_state_does_not_divide_is_refused(
    make_model: Callable[..., Any], head_dim: int, fits: str
) -> None:
    teacher, placement = make_model("llama", head_dim=head_dim), ["mamba1", *[ATTENTION] * 3]
    with pytest.raises(UserError, match=f"mixer.d_state=16 must divide head_dim={head_dim}: set it to {fits}$"):
        hybridize(teacher, placement, MixerConfig())
    largest = max(int(states) for states in fits.split(", ") if int(states) <= 16)
    assert hybridize(teacher, placement, MixerConfig(d_state=largest))(tokens(1, 5)).logits.isfinite().all()


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_scaled_positions_are_the_teachers_bit_for_bit(
    make_model: Callable[..., Any], name: str, rope: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also of a loaded hybrid, and beyond the length that the teacher was made for."""
    scaling = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    make_model(name, rope_parameters=scaling, max_position_embeddings=16).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype).eval()
    hybridize(teacher, [ATTENTION] * 4, MixerConfig()).save_pretrained(tmp_path / "hybrid")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=dtype).eval()
    swapped = hybridize(teacher, [ATTENTION, "mamba1", "mamba1", ATTENTION], MixerConfig())
    plain = make_model(name, max_position_embeddings=16).to(dtype)
    for length in (9, 40, 12):  # dynamic scaling grows with the longest text and must shrink again
        ids = tokens(1, length)
        expected = teacher(ids)
        for model in (loaded, swapped):
            model(ids)
            assert torch.equal(model.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)
        assert torch.equal(loaded(ids).logits, expected.logits)
    assert not torch.equal(plain(tokens(1, 40)).logits, teacher(tokens(1, 40)).logits), "the scaling does something"


def packed_logits(model: Any, documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of documents packed in one row, and the gradient of the last one's with respect to all inputs."""
    embeds = model.model.embed_tokens(torch.cat(documents, 1)).detach().requires_grad_()
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents]).unsqueeze(0)
    logits = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    last = logits[:, -documents[-1].shape[1] :]
    direction = torch.randn(last.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((last * direction).sum(), embeds)
    return last.detach(), gradient


@pytest.mark.parametrize("lengths", [(9, 8), (1, 8), (17, 1), (2, 13)])
def test_packed_documents_do_not_leak(hybrid_family: Any, lengths: tuple[int, int]) -> None:
    first, changed = tokens(1, lengths[0], seed=1), tokens(1, lengths[0], seed=2)
    second = tokens(1, lengths[1], seed=3)
    assert not torch.equal(first, changed)
    logits, gradient = packed_logits(hybrid_family, [first, second])
    other_logits, other_gradient = packed_logits(hybrid_family, [changed, second])
    assert torch.equal(logits, other_logits)
    assert torch.equal(gradient, other_gradient)
    assert not gradient[:, : lengths[0]].any(), "document 1 has no part in document 2"
    assert gradient[:, lengths[0] :].any()
    alone, alone_gradient = packed_logits(hybrid_family, [second])
    torch.testing.assert_close(logits, alone, **CLOSE)
    assert (gradient[:, lengths[0] :] - alone_gradient).abs().max() <= 1e-5 * alone_gradient.abs().max()


def test_rows_of_a_batch_are_packed_each_in_its_own_way(hybrid_family: Any) -> None:
    ids = tokens(2, 12)
    positions = torch.stack(
        [torch.cat([torch.arange(5), torch.arange(7)]), torch.cat([torch.arange(10), torch.arange(2)])]
    )
    with torch.no_grad():
        logits = hybrid_family(ids, position_ids=positions, use_cache=False).logits
        for row, cut in ((0, 5), (1, 10)):
            torch.testing.assert_close(logits[row, :cut], hybrid_family(ids[row : row + 1, :cut]).logits[0], **CLOSE)
            torch.testing.assert_close(logits[row, cut:], hybrid_family(ids[row : row + 1, cut:]).logits[0], **CLOSE)


def test_the_backbone_called_by_itself_keeps_documents_apart(hybrid: Any) -> None:
    """As a frozen teacher does, and a trainer with a fused LM head."""
    ids = torch.randint(5, 56, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        packed = hybrid.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        alone = hybrid.model(input_ids=ids[:, 10:], use_cache=False).last_hidden_state
        joined = hybrid.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(packed[:, 10:], alone, atol=1e-5)
    assert not torch.allclose(joined[:, 10:], alone, atol=1e-2)


def test_document_starts() -> None:
    starts = packed_starts(torch.tensor([[0, 1, 0, 1, 2], [7, 8, 9, 3, 4]]), (2, 5))
    assert starts is not None and starts.int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert packed_starts(torch.arange(5).unsqueeze(0), (2, 5)) is None
    assert read_padding(torch.ones(1, 5), 5) is None
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    whole, later = read_padding(mask, 4), read_padding(mask, 2)
    assert whole is not None and whole.starts[0].tolist() == [False, False, True, False]
    assert not whole.starts[1, 1:].any()
    assert later is not None and later.starts.tolist() == [[True, False], [False, False]]
    assert not whole.behind and whole.begun


@torch.no_grad()
def test_greedy_generation_is_argmax_of_full_forwards(hybrid_family: Any) -> None:
    ids = tokens(2, 7)
    generated = hybrid_family.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for _ in range(10):
        ids = torch.cat([ids, hybrid_family(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == ids.tolist()


@torch.no_grad()
def test_beam_search(hybrid_family: Any) -> None:
    """Beams swap places, so states must be reordered: the score it reports must be that of a full forward."""
    ids = tokens(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    greedy = hybrid_family.generate(ids, **options)
    assert torch.equal(hybrid_family.generate(ids, num_beams=1, **options), greedy)
    beams = hybrid_family.generate(
        ids, num_beams=4, length_penalty=0.0, return_dict_in_generate=True, output_scores=True, **options
    )

    def score(sequences: Tensor) -> Tensor:
        logits = hybrid_family(sequences, use_cache=False).logits[:, 6:-1].log_softmax(-1)
        return logits.gather(-1, sequences[:, 7:].unsqueeze(-1)).sum((1, 2))

    torch.testing.assert_close(beams.sequences_scores, score(beams.sequences), atol=1e-4, rtol=1e-4)
    assert (score(beams.sequences) >= score(greedy) - 1e-4).all()
    moved = beams.beam_indices[:, 1:8] != beams.beam_indices[:, :1]
    assert moved.any(), "no beam moved: the test shows nothing"


def test_gradient_checkpointing_gives_the_same_gradients(hybrid_family: Any) -> None:
    ids = tokens(2, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            hybrid_family.gradient_checkpointing_enable()
        hybrid_family.train().zero_grad()
        assert hybrid_family.is_gradient_checkpointing == checkpointing
        output = hybrid_family(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid_family.named_parameters()})
    assert all(gradient.any() for name, gradient in gradients[0].items() if "embed" not in name)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@torch.no_grad()
def test_eager_and_sdpa_agree(hybrid_family: Any) -> None:
    ids, positions = tokens(2, 12), torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    _, padded, mask = left_padded([11, 4])
    results = []
    for implementation in ("eager", "sdpa"):
        hybrid_family.set_attn_implementation(implementation)
        assert hybrid_family.config._attn_implementation == implementation
        packed = hybrid_family(ids, position_ids=positions, use_cache=False).logits
        masked = hybrid_family(padded, attention_mask=mask).logits[mask.bool()]
        results.append((hybrid_family(ids).logits, packed, masked))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_importing_the_package_is_enough_to_load(hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path)
    program = (
        "import sys, distill\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, *model.config.mixers)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["HybridLlamaForCausalLM", *hybrid.config.mixers]
