"""Merging: an exact average of two checkpoints, sharded or not, and a clear word where two do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.posttrain import merge as module
from distill.posttrain.merge import checkpoint_folder, merge

PLACEMENT = ["mamba1", "attention", "attention", "mamba1"]
Make = Callable[..., Path]


@pytest.fixture
def make(make_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Make:
    """``make(name, seed, mixers=..., shard="1GB", dtype=..., **llama)``: a hybrid checkpoint of random weights."""

    def build(
        name: str,
        seed: int,
        *,
        mixers: list[str] = PLACEMENT,
        shard: str = "1GB",
        dtype: torch.dtype = torch.float32,
        d_state: int = 16,
        **keys: Any,
    ) -> Path:
        model = hybridize(make_llama(**keys), mixers, MixerConfig(d_state=d_state), seed=0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=shard)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_average_of_every_tensor_and_a_checkpoint_that_loads(make: Make, tmp_path: Path) -> None:
    a, b = make("a", 1), make("b", 2)
    merge(a, b, 0.3, tmp_path / "out")
    left, right, out = weights(a), weights(b), weights(tmp_path / "out")
    assert out.keys() == left.keys()
    assert "lm_head.weight" not in out, "tied"
    for key, tensor in out.items():
        assert tensor.dtype == torch.float32
        expected = 0.3 * left[key].double() + 0.7 * right[key].double()
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-6), key
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, out["model.embed_tokens.weight"])
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes()
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["alpha"] == 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_1_is_a_and_0_is_b_bit_for_bit(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = make("a", 1, dtype=dtype), make("b", 2, dtype=dtype)
    merge(a, b, 1, tmp_path / "one")
    merge(a, b, 0, tmp_path / "zero")
    assert same(weights(tmp_path / "one"), weights(a))
    assert same(weights(tmp_path / "zero"), weights(b))
    assert not same(weights(a), weights(b))
    merge(a, b, 0.5, tmp_path / "half")
    for key, tensor in weights(tmp_path / "half").items():
        assert tensor.dtype == dtype
        mean = (weights(a)[key].float() + weights(b)[key].float()) / 2
        if dtype == torch.bfloat16:
            assert torch.equal(tensor, mean.to(dtype)), f"{key}: averaged in float32, rounded once"
        else:
            assert torch.allclose(tensor, mean, rtol=1e-6, atol=1e-6)
    merge(a, a, 0.3, tmp_path / "itself")
    assert same(weights(tmp_path / "itself"), weights(a)), "what agrees is not rounded"


def test_shards(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any sharding of A and B gives the same tensors, in A's shards, one shard in memory at a time."""
    a, b, sharded_a, sharded_b = make("a", 1), make("b", 2), make("as", 1, shard="50KB"), make("bs", 2, shard="90KB")
    names = sorted(path.name for path in sharded_a.glob("*.safetensors"))
    assert len(names) > 2 and len(list(sharded_b.glob("*.safetensors"))) not in (1, len(names))
    sizes = []
    save = module.save_file
    monkeypatch.setattr(module, "save_file", lambda t, *rest, **named: (sizes.append(len(t)), save(t, *rest, **named)))
    merge(sharded_a, sharded_b, 0.25, tmp_path / "sharded")
    assert len(sizes) == len(names) and sum(sizes) == len(weights(a)) > max(sizes)
    merge(a, b, 0.25, tmp_path / "whole")
    merge(a, sharded_b, 0.25, tmp_path / "mixed")
    assert same(weights(tmp_path / "sharded"), weights(tmp_path / "whole"))
    assert same(weights(tmp_path / "mixed"), weights(tmp_path / "whole"))
    assert sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors")) == names
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_checkpoints_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    """Each with its reason; nothing is left where the merge would have gone."""
    a = make("a", 1)
    others: dict[str, tuple[Path, str]] = {
        "placement": (
            make("placement", 2, mixers=["mamba1", "mamba1", "attention", "attention"]),
            r"differ in 2 block\(s\)\n  block 1: attention against mamba1\n  block 3: mamba1 against attention",
        ),
        "blocks": (make("blocks", 2, num_hidden_layers=5, mixers=[*PLACEMENT, "attention"]), "4 blocks against 5"),
        "shape": (make("shape", 2, intermediate_size=96), r"intermediate_size: 64 -> 96"),
        "state": (make("state", 2, d_state=8), r"mixer_config\.d_state: 16 -> 8"),
        "rope": (make("rope", 2), r"rope_theta"),
        "family": (make("family", 2), "architecture hybrid_llama against hybrid_mistral"),
        "dtype": (make("dtype", 2, dtype=torch.bfloat16), r"F32 \[.*\] in A, BF16 \[.*\] in B"),
        "keys": (make("keys", 2), r"2 tensor\(s\) differ\n  extra: only in B\n  model.norm.weight: only in A"),
        "size": (make("size", 2), r"model.norm.weight: F32 \[48\] in A, F32 \[47\] in B"),
        "broken": (make("broken", 2), "cannot read .*model.safetensors"),
        "bins": (make("bins", 2), "cannot read .*model.safetensors"),
    }
    edit(others["rope"][0], "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    edit(others["family"][0], "config.json", model_type="hybrid_mistral")
    for name in ("keys", "size"):
        path = others[name][0] / "model.safetensors"
        tensors = load_file(path)
        norm = tensors.pop("model.norm.weight")
        tensors |= {"extra": norm} if name == "keys" else {"model.norm.weight": norm[:-1].clone()}
        save_file(tensors, path, metadata={"format": "pt"})
    (others["broken"][0] / "model.safetensors").write_bytes(b"torn")
    (others["bins"][0] / "model.safetensors").unlink()
    for name, (other, message) in others.items():
        with pytest.raises(UserError, match=message):
            merge(a, other, 0.5, tmp_path / "out")
        assert not list(tmp_path.glob("*out*")), name


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_0_to_1_is_refused(make: Make, tmp_path: Path, alpha: float) -> None:
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        merge(make("a", 1), tmp_path / "a", alpha, tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_half_written(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make("a", 1), make("b", 2)
    with pytest.raises(UserError, match="exists already"):
        merge(a, b, 0.5, b)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        merge(a, b, 0.5, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_lineage_is_kept_and_says_what_was_merged(make: Make, tmp_path: Path) -> None:
    a, b = make("a", 1), make("b", 2)
    merge(a, b, 0.5, tmp_path / "none")
    assert not (tmp_path / "none" / "lineage.json").exists()
    first = {"name": "H1-2/4", "tokens": 100, "steps": 2}
    (a / "lineage.json").write_text(json.dumps([first, {"name": "H1-2/4-SFT", "tokens": 50, "steps": 1}]))
    (b / "lineage.json").write_text(json.dumps([first]))
    merge(a, b, 0.5, tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert [entry["name"] for entry in lineage] == ["H1-2/4", "H1-2/4-SFT", "merged with H1-2/4 (alpha 0.5)"]
    assert sum(entry["tokens"] for entry in lineage) == 150


def test_what_names_a_checkpoint(make: Make, tmp_path: Path) -> None:
    a = make("stage/train/checkpoint", 1)
    for name in ("stage", "stage/train", "stage/train/checkpoint"):
        assert checkpoint_folder(tmp_path / name) == a
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint_folder(tmp_path)
