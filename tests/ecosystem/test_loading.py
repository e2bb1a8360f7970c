"""Saving and loading as users do it: shards, device maps, offloading, dtypes, kinds of attention, little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.mixers import mixer_class

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def tokens(*shape: int) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mixed(make_model: Callable[..., Any]) -> Any:
    """Both mixers, in a family that has norms on q and k and so on B and C."""
    return hybridize(make_model("qwen3"), ["mamba2", "attention", "attention", "mamba1"], MixerConfig(), seed=0)


@pytest.fixture
def shards(mixed: Any, tmp_path: Path) -> Path:
    """The model saved in many shards."""
    mixed.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    return tmp_path / "shards"


OFFLOADED = {f"model.layers.{block}": "disk" if block in (0, 1) else "cpu" for block in range(4)}
MAPS: dict[str, Any] = {
    "none": None,
    "auto": "auto",
    "cpu": "cpu",
    "everything on the cpu": {"": "cpu"},
    "two blocks on disk": OFFLOADED | dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
def test_shards_load_bit_for_bit_wherever_they_go(mixed: Any, shards: Path, tmp_path: Path, name: str) -> None:
    options = {"device_map": MAPS[name], "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(shards, **options).eval()
    ids = tokens(2, 11)
    assert torch.equal(loaded(ids).logits, mixed(ids).logits)
    step = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **step), mixed.generate(ids, **step))
    if "disk" in name:
        assert {p.device.type for p in loaded.model.layers[0].self_attn.parameters()} == {"meta"}
        assert {p.device.type for p in loaded.model.layers[3].self_attn.parameters()} == {"cpu"}


@torch.no_grad()
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", "auto"])
def test_dtypes(mixed: Any, shards: Path, key: str, dtype: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(shards, **{key: dtype}).eval()
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert loaded.dtype == wanted
    for name, parameter in loaded.named_parameters():
        exact = name.endswith(("A_log", "self_attn.D"))
        assert parameter.dtype == (torch.float32 if exact else wanted), name
    ids = tokens(2, 11)
    difference = (loaded(ids).logits.float() - mixed(ids).logits).abs().max()
    assert difference < (1e-5 if wanted == torch.float32 else 0.3)
    cache = loaded(ids).past_key_values
    for block in (0, 3):  # the state is summed in fp32 whatever the weights are
        assert cache.layers[block].recurrent_states[0].dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(
    "implementation",
    ["eager", "sdpa", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("flex_attention", "flash_attention_2"))],
)
def test_attention_implementations_agree(mixed: Any, shards: Path, implementation: str) -> None:
    """Plain, left-padded and packed rows, and decoding. Flash attention takes bf16 only; flex attention compiles
    itself, and torch 2.13's C++ for masks on a CPU does not compile."""
    flash = implementation == "flash_attention_2"
    if implementation in ("flex_attention", "flash_attention_2"):
        pytest.importorskip("flash_attn" if flash else "triton")
        options = {"dtype": torch.bfloat16 if flash else torch.float32, "device_map": "cuda"}
    else:
        options = {}
    loaded = AutoModelForCausalLM.from_pretrained(shards, attn_implementation=implementation, **options).eval()
    assert loaded.config._attn_implementation == implementation
    reference = mixed.to(loaded.device)
    ids = tokens(2, 11).to(loaded.device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    packed = torch.tensor([[*range(5), *range(6)]], device=ids.device).expand(2, -1)
    close = {"atol": 0.3, "rtol": 0.05} if flash else CLOSE
    for given in ({}, {"attention_mask": mask}, {"position_ids": packed}):
        seen = mask.bool() if "attention_mask" in given else torch.ones_like(mask).bool()
        wanted, made = (model(ids, use_cache=False, **given).logits[seen].float() for model in (reference, loaded))
        torch.testing.assert_close(made, wanted, **close)
    if not flash:
        step = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        assert torch.equal(loaded.generate(ids, **step), reference.generate(ids, **step))


@pytest.mark.parametrize("key", [{}, {"low_cpu_mem_usage": True}])
def test_a_loaded_model_is_first_made_without_memory(
    shards: Path, key: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, the mixers too, so that there is never a second copy beside the weights read."""
    devices = []
    for name in ("mamba1", "mamba2"):
        mixer = mixer_class(name)
        made = mixer.reset_parameters
        monkeypatch.setattr(
            mixer, "reset_parameters", lambda self, made=made: (devices.append(self.A_log.device.type), made(self))
        )
    AutoModelForCausalLM.from_pretrained(shards, **key)
    assert devices and set(devices) == {"meta"}


PEAK = """
import json, resource, sys
import torch
import distill
from transformers import AutoModelForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"size": size, "grown": 1024 * (after - before)}))
"""


@pytest.mark.slow
def test_loading_holds_no_second_copy(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Peak memory of a process that loads 300 MB in shards of 30 MB: the weights, and what a shard or two take."""
    shape = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    teacher = make_model("llama", **shape, intermediate_size=2816)
    hybridize(teacher, ["mamba2", "attention", "mamba1", "mamba2"], MixerConfig()).save_pretrained(
        tmp_path, max_shard_size="30MB"
    )
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["size"] > 200e6
    assert measured["grown"] < 1.5 * measured["size"], measured


def test_the_config_alone_says_what_it_is(shards: Path) -> None:
    config = AutoConfig.from_pretrained(shards)
    assert config.mixers == ["mamba2", "attention", "attention", "mamba1"]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
