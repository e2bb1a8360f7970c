"""What transformers and its neighbours take for granted of a model class, held for hybrids of every family.

The same contracts that transformers' own checks ask of its models (``make test-transformers`` runs those).
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from distill.config import MixerConfig
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import hybridize
from distill.mixers import ATTENTION

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SUITE = [ATTENTION, "mamba2", ATTENTION, "mamba1"]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(seed))


def replaced(model: Any) -> dict[str, Any]:
    """Mixers by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "mil_slots")}


@pytest.fixture(params=["llama", "qwen3"])
def mixed(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    """A hybrid with both mixers and tied embeddings: plain, and with norms on q and k."""
    return hybridize(make_model(request.param), SUITE, MixerConfig())


def test_the_config_goes_round(hybrid_family: Any, tmp_path: Path) -> None:
    config = hybrid_family.config
    config.save_pretrained(tmp_path)
    for again in (
        type(config).from_dict(config.to_dict()),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(again) is type(config)
        assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert again.mixers == config.mixers and again.layer_types == config.layer_types
    kinds = ["full_attention" if mixer == ATTENTION else "linear_attention" for mixer in config.mixers]
    assert config.layer_types == kinds and "layer_types" not in config.to_diff_dict()
    assert type(config).from_dict({**config.to_dict(), "mixers": [ATTENTION] * 4}).layer_types == ["full_attention"] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_can_be_named_imported_and_pickled(make_model: Callable[..., Any], family: str) -> None:
    """A spawned worker, a whole-object save and Ray all pickle by module and name."""
    model = hybridize(make_model(family), SUITE, MixerConfig())
    for made in (type(model), MODEL_MAPPING[type(model.config)], type(model.config)):
        assert getattr(inspect.getmodule(made), made.__name__) is made
    ids = tokens(1, 7)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_outputs_have_the_shapes_that_are_documented(hybrid_family: Any) -> None:
    """Attention weights of the attention blocks alone; hidden states of all."""
    hybrid_family.set_attn_implementation("eager")
    ids, config = tokens(2, 9), hybrid_family.config
    output = hybrid_family(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 9, 9)] * config.mixers.count(ATTENTION)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 9, config.hidden_size)] * 5
    assert output.logits.shape == (2, 9, config.vocab_size)
    as_tuple = hybrid_family(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_a_prefill_makes_the_logits_of_one_token(hybrid_family: Any) -> None:
    """``generate`` looks for ``logits_to_keep`` by name; without it a long prompt costs length x vocabulary."""
    ids, seen = tokens(2, 9), []
    whole = hybrid_family(ids).logits
    for keep in (1, 4, torch.tensor([2, 5])):
        wanted = whole[:, keep] if isinstance(keep, Tensor) else whole[:, -keep:]
        torch.testing.assert_close(hybrid_family(ids, logits_to_keep=keep).logits, wanted, **CLOSE)
    hybrid_family.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    hybrid_family.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen == [1, 1, 1]


def test_labels_may_come_shifted(mixed: Any) -> None:
    """As sequence parallelism and trainers with their own count of tokens give them."""
    ids = tokens(2, 9)
    plain = mixed(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(mixed(ids, labels=ids, shift_labels=shifted).loss, plain)
    half = mixed(ids, labels=ids, num_items_in_batch=torch.tensor(32)).loss
    torch.testing.assert_close(half, plain * 16 / 32)
    assert set(inspect.signature(mixed.forward).parameters) >= {"labels", "use_cache", "logits_to_keep", "position_ids"}


@torch.no_grad()
def test_embeddings_serve_for_ids(hybrid_family: Any) -> None:
    ids = tokens(2, 9)
    embeds = hybrid_family.get_input_embeddings()(ids)
    assert torch.equal(hybrid_family(inputs_embeds=embeds).logits, hybrid_family(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generated = hybrid_family.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(generated, hybrid_family.generate(ids, **options)[:, 9:])


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(hybrid_family: Any) -> None:
    ids = tokens(5, 9)
    batch = hybrid_family(ids).logits
    for row in range(5):
        torch.testing.assert_close(batch[row], hybrid_family(ids[row : row + 1]).logits[0], **CLOSE)


@torch.no_grad()
def test_generation_continues_from_a_cache(hybrid_family: Any) -> None:
    """3 tokens, and 4 more with the cache of the first call: as 7 at once, in tokens, scores and states."""
    ids, options = tokens(2, 6), {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    once = hybrid_family.generate(ids, max_new_tokens=7, output_logits=True, **options)
    first = hybrid_family.generate(ids, max_new_tokens=3, **options)
    then = hybrid_family.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, output_logits=True, **options
    )
    assert torch.equal(then.sequences, once.sequences)
    torch.testing.assert_close(torch.stack(then.logits), torch.stack(once.logits)[3:], **CLOSE)
    for one, other in zip(once.past_key_values.layers, then.past_key_values.layers, strict=True):
        for state in ("keys", "values") if not isinstance(one, LinearAttentionLayer) else ():
            torch.testing.assert_close(getattr(other, state), getattr(one, state), **CLOSE)
        for state in ("conv_states", "recurrent_states") if isinstance(one, LinearAttentionLayer) else ():
            torch.testing.assert_close(getattr(other, state)[0], getattr(one, state)[0], **CLOSE)


@torch.no_grad()
def test_the_cache_has_the_documented_shapes(hybrid_family: Any) -> None:
    cache = hybrid_family(tokens(3, 9), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 9 and len(cache) == 4
    for layer, mixer in zip(cache.layers, hybrid_family.config.mixers, strict=True):
        if mixer == ATTENTION:
            assert layer.keys.shape == layer.values.shape == (3, 2, 9, 32)
        else:  # inner width 4 heads * 32; three taps behind the current token
            mamba1 = mixer == "mamba1"
            assert layer.conv_states[0].shape == (3, 128 if mamba1 else 3 * 128, 3)
            assert layer.recurrent_states[0].shape == ((3, 128, 16) if mamba1 else (3, 4, 32, 32))
            assert layer.recurrent_states[0].dtype == torch.float32


def test_embeddings_can_be_resized(hybrid_family: Any, tmp_path: Path) -> None:
    ids = tokens(2, 7)
    size = hybrid_family.config.vocab_size
    before = hybrid_family(ids).logits
    for new in (size + 10, size - 3):
        hybrid_family.resize_token_embeddings(new)
        logits = hybrid_family(ids).logits
        assert logits.shape[-1] == new == hybrid_family.config.vocab_size
        torch.testing.assert_close(logits[..., : size - 3], before[..., : size - 3])
        tied = hybrid_family.lm_head.weight is hybrid_family.get_input_embeddings().weight
        assert tied == hybrid_family.config.tie_word_embeddings
    hybrid_family.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_tied_weights_are_kept_once(hybrid_family: Any, tmp_path: Path) -> None:
    tied = hybrid_family.config.tie_word_embeddings
    hybrid_family.save_pretrained(tmp_path)
    written = set(load_file(tmp_path / "model.safetensors"))
    expected = set(hybrid_family.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert written == expected
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_the_backbone_loads_by_itself(hybrid_family: Any, tmp_path: Path) -> None:
    """``AutoModel``: what feature extraction and embedding tools load; and back into a model with a head."""
    ids = tokens(2, 9)
    hidden = hybrid_family.model(ids).last_hidden_state
    hybrid_family.save_pretrained(tmp_path / "whole")
    backbone, report = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(backbone).__name__ == f"Hybrid{type(hybrid_family.model).__name__}" and not backbone.can_generate()
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"lm_head.weight"}
    assert torch.equal(backbone.eval()(ids).last_hidden_state, hidden)
    backbone.save_pretrained(tmp_path / "backbone")
    assert set(load_file(tmp_path / "backbone" / "model.safetensors")) == set(hybrid_family.model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").eval()
    assert torch.equal(again.model(ids).last_hidden_state, hidden)


def starts_as_its_paper_says(mixer: Any) -> None:
    """Decay, skip, step size and taps as the mixer's own initialisation leaves them."""
    step = torch.nn.functional.softplus(mixer.dt_proj.bias if hasattr(mixer, "dt_proj") else mixer.dt_bias)
    assert ((step >= 0.99e-4) & (step <= 0.101)).all(), "steps of 1e-3 to 1e-1"
    decay = mixer.A_log.exp()
    assert decay.isfinite().all() and decay.min() >= 0.99 and decay.max() <= 16.01
    assert mixer.D.eq(1).all()
    assert mixer.conv1d.weight.abs().max() <= 0.5 and mixer.conv1d.weight.std() > 0.2, "uniform in +-K**-0.5"


def test_a_model_from_a_config_starts_as_its_mixers_do(mixed: Any) -> None:
    for auto in (AutoModelForCausalLM, AutoModel):
        mixers = replaced(auto.from_config(mixed.config))
        assert len(mixers) == 2
        for mixer in mixers.values():
            starts_as_its_paper_says(mixer)


def test_weights_that_a_checkpoint_lacks_are_initialised_and_the_others_left(mixed: Any, tmp_path: Path) -> None:
    """Not garbage in what is missing, nor a fresh start for the rest of that mixer."""
    mixed.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lacking = re.compile(r"layers\.1\.self_attn\.|layers\.3\.self_attn\.(A_log|D|dt_proj\.bias)$")
    save_file({k: v for k, v in weights.items() if not lacking.search(k)}, file, metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {k for k in weights if lacking.search(k)}
    starts_as_its_paper_says(loaded.model.layers[1].self_attn)
    third = loaded.model.layers[3].self_attn
    assert torch.equal(third.A_log.exp()[0], torch.arange(1.0, 17.0).log().exp()) and third.D.eq(1).all()
    for name, tensor in loaded.state_dict().items():
        if name in weights and not lacking.search(name):
            assert torch.equal(tensor, weights[name]), name


def test_sharded_mixers_are_left_as_they_were_built(mixed: Any) -> None:
    """In ZeRO-3 a parameter is empty from the end of its module's construction on."""
    for mixer in replaced(mixed).values():
        vars(mixer).pop("_is_hf_initialized", None)
        for parameter in mixer.parameters():
            parameter.data = torch.empty(0)
    mixed.initialize_weights()
    assert not any(parameter.numel() for mixer in replaced(mixed).values() for parameter in mixer.parameters())


def test_a_model_on_meta_takes_no_memory(mixed: Any) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(mixed.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in mixed.named_parameters()}


@torch.no_grad()
def test_weights_may_wait_on_disk(mixed: Any, tmp_path: Path) -> None:
    """Offloaded weights come in just before the forward of the module that holds them, and go behind it."""
    ids, options = tokens(2, 9), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    mixed.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{block}": "disk" for block in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert all(parameter.device.type == "meta" for parameter in loaded.model.layers.parameters())
    assert torch.equal(loaded(ids).logits, mixed(ids).logits)
    assert torch.equal(loaded.generate(ids, **options), mixed.generate(ids, **options))


def test_no_block_is_split_over_devices(hybrid_family: Any) -> None:
    """Residual additions need a block's parts on one device."""
    names = {type(module).__name__ for module in hybrid_family.model.layers}
    assert names == set(hybrid_family._no_split_modules)
    size = sum(p.numel() * p.element_size() for p in hybrid_family.model.layers[0].parameters())
    device_map = infer_auto_device_map(
        hybrid_family,
        max_memory={0: int(2.5 * size), 1: 3 * size, "cpu": 100 * size},
        no_split_module_classes=hybrid_family._no_split_modules,
    )
    assert not any("layers" in name and name.count(".") > 2 for name in device_map), device_map
    assert len({device for name, device in device_map.items() if "layers" in name}) > 1


def test_a_tensor_parallel_plan_leaves_mixers_whole(hybrid_family: Any) -> None:
    """The family's plan names q_proj and the like: attention and MLP are sharded by it, a mixer is on every rank."""
    plan = hybrid_family.tp_plan
    rules = [re.compile(re.sub(r"\\\*", r"\\d+", re.escape(rule)) + r"(\.|$)") for rule in plan]
    names = [name for name, _ in hybrid_family.named_parameters()]
    assert rules and all(any(rule.match(name) for name in names) for rule in rules if "lm_head" not in rule.pattern)
    for mixer in replaced(hybrid_family):
        assert not [n for n in names if n.startswith(f"{mixer}.") and any(rule.match(n) for rule in rules)]


def test_the_pipeline_plan_names_the_backbone(hybrid_family: Any) -> None:
    plan = hybrid_family.config.base_model_pp_plan
    assert set(plan) == {name for name, _ in hybrid_family.model.named_children() if name != "rotary_emb"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_and_a_frozen_base(mixed: Any, reentrant: bool) -> None:
    """As PEFT trains: inputs require grad, one mixer's projection is all that learns."""
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        model = copy.deepcopy(mixed).train().requires_grad_(False)
        learns = model.model.layers[1].self_attn.in_proj.weight.requires_grad_()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert sum(p.grad is not None for p in model.parameters()) == 1
        gradients.append(learns.grad)
    assert gradients[0].any() and torch.equal(gradients[0], gradients[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(mixed: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Decay and skip stay fp32 where the rest is narrower; ``auto`` finds the dtype again; logits are in it."""
    mixed.save_pretrained(tmp_path / "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype).eval()
    narrow = dtype.itemsize < 4
    for mixer in replaced(model).values():
        assert {p.dtype for n, p in mixer.named_parameters() if n in ("A_log", "D")} == {torch.float32}
        assert {p.dtype for n, p in mixer.named_parameters() if n not in ("A_log", "D")} == {dtype}
    ids = tokens(2, 9)
    logits = model(ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), mixed(ids).logits, atol=0.1 if narrow else 1e-4, rtol=0.1)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert again.dtype == dtype
    torch.testing.assert_close(again(ids).logits, logits)


SHARDED = """
import sys
import torch, torch.distributed as dist
import distill
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
shared = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto")).eval()
ids = torch.arange(5, 14)[None]
with torch.no_grad():
    assert type(shared.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
    assert type(shared.model.layers[1].self_attn.in_proj.weight).__name__ == "Parameter"
    torch.testing.assert_close(shared(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(shared.generate(ids, **options), whole.generate(ids, **options))
if dist.get_rank() == 0:
    print("equal on", dist.get_world_size(), "ranks")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_share_a_model(make_model: Callable[..., Any], tied: bool, tmp_path: Path) -> None:
    """Tensor parallelism by the family's plan: attention and MLP in shards, mixers whole, the same logits."""
    hybridize(make_model("llama", tie_word_embeddings=tied), SUITE, MixerConfig()).save_pretrained(tmp_path / "hybrid")
    (tmp_path / "program.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(tmp_path / "program.py"), str(tmp_path / "hybrid")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "equal on 2 ranks" in run.stdout
