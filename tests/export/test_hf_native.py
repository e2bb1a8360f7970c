"""The hybrid in GraniteMoeHybrid: the same logits for any shape that fits, in a process that has never heard of us."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GraniteMoeHybridForCausalLM

from distill.config import MixerConfig
from distill.errors import UserError
from distill.export import hf_native, support_table
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import hybridize
from stages import export as verb
from stages.cli import main

SaveHybrid = Callable[..., Any]
FITTING = ("llama", "mistral", "qwen2", "granite")


@pytest.mark.parametrize("seed", range(24))
def test_a_mamba2_hybrid_goes_out_exactly_and_comes_back(seed: int, saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    hybrid = saved_hybrid(seed, tmp_path / "hybrid", FITTING[seed % len(FITTING)])
    hf_native.export(tmp_path / "hybrid", tmp_path / "native", shard=40_000)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert type(native) is GraniteMoeHybridForCausalLM
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours, theirs = hybrid(ids).logits, native(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    hf_native.import_folder(tmp_path / "native", tmp_path / "back", shard=40_000)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(hybrid) and back.config.mixers == hybrid.config.mixers
    expected = hybrid.state_dict()
    assert expected.keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())


def test_a_folder_of_others_becomes_a_hybrid_of_the_granite_family(saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    hybrid = saved_hybrid(3, tmp_path / "hybrid", "llama")
    hf_native.export(tmp_path / "hybrid", tmp_path / "native")
    (tmp_path / "native/distill.json").unlink()
    AutoModelForCausalLM.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "theirs")  # as they write it
    for source in ("native", "theirs"):
        hf_native.import_folder(tmp_path / source, tmp_path / f"from-{source}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"from-{source}").eval()
        assert model.config.model_type == "hybrid_granite" and model.config.mixers == hybrid.config.mixers
        ids = torch.arange(60)[None]
        torch.testing.assert_close(model(ids).logits, hybrid(ids).logits, rtol=1e-5, atol=1e-5)


WITHOUT_US = """
import sys
for name in ("distill", "eval", "stages"):
    sys.modules[name] = None  # importing it is an ImportError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("add 12+34", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)
with torch.no_grad():
    full = model(out).logits
    cache = model(out[:, :-1]).past_key_values
    step = model(out[:, -1:], past_key_values=cache).logits[:, -1]
print((full[:, -1] - step).abs().max().item() <= 1e-4 * full.abs().max().item(), out[0].tolist())
"""


def test_a_process_without_our_package_generates_the_same_text(
    make_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    teacher = make_llama(vocab_size=len(tokenizer), hidden_size=192)
    hybrid = hybridize(teacher, ["mamba2", "attention", "mamba2", "attention"], MixerConfig(name="mamba2"))
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    assert main(["export", str(tmp_path / "hybrid"), "--to", "hf-native", "--output", str(tmp_path / "native")]) == 0
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_US, str(tmp_path / "native")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cached, _, theirs = done.stdout.strip().splitlines()[-1].partition(" ")
    ids = tokenizer("add 12+34", return_tensors="pt").input_ids
    ours = hybrid.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)[0].tolist()
    assert cached == "True" and json.loads(theirs) == ours


def test_the_config_on_disk_is_what_other_tools_read(saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    saved_hybrid(3, tmp_path / "hybrid", "llama")
    hf_native.export(tmp_path / "hybrid", tmp_path / "native")
    keys = json.loads((tmp_path / "native/config.json").read_text())
    assert set(keys["layer_types"]) <= {"mamba", "attention"} and keys["num_local_experts"] == 0
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] and "head_dim" not in keys
    assert keys["mamba_n_heads"] * keys["mamba_d_head"] == keys["mamba_expand"] * keys["hidden_size"]
    assert "time_step_limit" not in keys and isinstance(keys["mamba_expand"], int)


CASES: list[tuple[str, dict[str, Any], list[str], dict[str, Any], str]] = [
    ("llama", {}, ["mamba1", "attention"], {}, r"mamba1 \(block 0\), which no other tool holds; mixer.name=mamba2"),
    ("qwen3", {}, ["mamba2", "attention"], {}, r"norms on queries and keys.*; norms on B and C \(bc_norm\)"),
    ("llama", {}, ["mamba2", "attention"], {"bc_norm": "always"}, "mixer.bc_norm=never"),
    ("llama", {"head_dim": 32}, ["mamba2", "attention"], {}, "4 heads of 32 in a width of 64, where 2 fit"),
    ("llama", {"head_dim": 24}, ["mamba2", "attention"], {}, "a hidden size of 64, no multiple of head_dim=24"),
    ("llama", {"hidden_size": 96, "num_key_value_heads": 4, "head_dim": 16}, ["mamba2", "attention"], {},
     "4 key/value heads do not divide the 6 heads"),
    ("llama", {"hidden_act": "gelu"}, ["mamba2", "attention"], {}, "hidden_act=gelu"),
    ("llama", {"mlp_bias": True}, ["mamba2", "attention"], {}, "mlp_bias"),
    ("smollm3", {"no_rope_layers": [1, 0]}, ["mamba2", "attention"], {}, "without rotary positions in block 1"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys", "mixers", "options", "message"), CASES)
def test_what_the_container_cannot_hold_is_refused(
    family: str, keys: dict[str, Any], mixers: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shape = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
        "num_hidden_layers": 2, "vocab_size": 32, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **keys}))
    hybridize(teacher, mixers, MixerConfig(**options)).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UserError, match=message):
        hf_native.export(tmp_path / "hybrid", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_smollm3_whose_blocks_without_positions_are_converted_goes_out(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "smollm3", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        num_hidden_layers=4, vocab_size=64, no_rope_layers=[1, 1, 1, 0], pad_token_id=None, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    hybrid = hybridize(
        AutoModelForCausalLM.from_config(config).eval(), ["attention"] * 3 + ["mamba2"], MixerConfig(name="mamba2")
    )
    hybrid.save_pretrained(tmp_path / "hybrid")
    hf_native.export(tmp_path / "hybrid", tmp_path / "native")
    ids = torch.arange(60)[None]
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    torch.testing.assert_close(native(ids).logits, hybrid(ids).logits, rtol=1e-4, atol=1e-5)


def test_wrong_folders(
    llama: Any, saved_hybrid: SaveHybrid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_hybrid(3, tmp_path / "hybrid", "llama")
    llama.save_pretrained(tmp_path / "teacher")
    native = tmp_path / "native"
    hf_native.export(tmp_path / "hybrid", native)
    export, to = ["export", str(tmp_path / "hybrid")], ["--to", "hf-native", "--output", str(tmp_path / "out")]
    for arguments, message in (
        ([*export, "--to", "hf-nativ", "--output", "x"], "did you mean 'hf-native'"),
        ([*export, "--to", "hf-native"], "--output DIR"),
        ([*export, "--to", "hf-native", "--output", str(native)], "exists already"),
        (["export", str(tmp_path / "teacher"), *to], "is no hybrid of ours"),
        (["export", str(tmp_path / "nowhere"), *to], "no folder"),
        (["import", str(tmp_path / "teacher"), "--output", str(tmp_path / "out")], "is no granitemoehybrid folder"),
        (["import", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")], "no folder"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    keys = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps({**keys, "hidden_size": 512}))
    with pytest.raises(UserError, match="is of another model: hidden_size is 512 here"):
        hf_native.import_folder(native, tmp_path / "out")
    (native / "distill.json").unlink()
    (native / "config.json").write_text(json.dumps({**keys, "mamba_n_groups": 1}))
    with pytest.raises(UserError, match="mamba_n_groups=1 "):
        hf_native.import_folder(native, tmp_path / "out")
    (tmp_path / "hybrid/model.safetensors").write_bytes(b"cut")
    assert main([*export, *to]) == 2 and not (tmp_path / "out").exists()


def test_the_table_names_every_family_and_is_in_the_readme() -> None:
    rows = support_table()
    assert {row["teacher"] for row in rows} == set(FAMILIES)
    exact = {row["teacher"] for row in rows if row["mixer"] == "mamba2" and row["hf-native"] == "exact"}
    assert exact == set(FITTING)
    assert verb.table() in (Path(__file__).parents[2] / "README.md").read_text()
