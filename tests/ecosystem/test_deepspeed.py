"""DeepSpeed on hybrids: two ranks under every ZeRO stage train as one process does, save, and are loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'distill-hybrid[deepspeed]'"),
]
ROOT = Path(__file__).parents[2]
MIXED = ["mamba2", "attention", "attention", "mamba1"]
EXACT = ("zero1", "zero2", "zero3")


def snippets() -> list[str]:
    """The code of docs/ecosystem.md on DeepSpeed."""
    text = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8").split("## DeepSpeed")[1]
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Any], chain: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved hybrid with a mixer of each kind, and the rows to train on."""
    folder = tmp_path_factory.mktemp("deepspeed")
    hybridize(make_llama(), MIXED, MixerConfig(), seed=0).save_pretrained(folder / "my-hybrid")
    torch.save(chain, folder / "ids.pt")
    rows = [{"input_ids": row, "labels": row} for row in chain.tolist()] * 6
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "snippet.py").write_text(snippets()[0])
    return folder


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    """What two ranks left: all runs in one launch, for a launch takes longer than a run."""
    folder = source / "output"
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    worker = str(Path(__file__).with_name("deepspeed_worker.py"))
    done = subprocess.run(
        [*launch, worker, str(source), str(folder)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(output: Path) -> dict[str, Any]:
    """What the runs reported."""
    return json.loads((output / "found.json").read_text())


@pytest.fixture(scope="module")
def plain(source: Path, chain: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """The same training in one process without DeepSpeed: losses, and parameters at its end."""
    model = AutoModelForCausalLM.from_pretrained(source / "my-hybrid").train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0), []
    for _ in range(6):
        loss = model(input_ids=chain, labels=chain, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(output: Path, run: str) -> dict[str, Tensor]:
    """The parameters that a run ended with, in fp32."""
    return torch.load(output / run / "expected.pt")


def test_losses_are_those_of_one_process(found: dict[str, Any], plain: tuple[list[float], Any]) -> None:
    assert plain[0][-1] < 0.5 * plain[0][0]
    for run in EXACT:
        assert found[run]["losses"] == pytest.approx(plain[0], rel=1e-4), run
    for run in ("zero3_bf16", "zero3_autocast"):
        assert found[run]["losses"] == pytest.approx(plain[0], rel=0.03), run


def test_parameters_are_those_of_one_process(output: Path, plain: tuple[Any, dict[str, Tensor]]) -> None:
    for run in EXACT:
        ours = trained(output, run)
        assert ours.keys() == plain[1].keys()
        for name, tensor in plain[1].items():
            assert torch.allclose(ours[name], tensor, atol=1e-3, rtol=1e-2), name


def test_a_saved_run_goes_on(found: dict[str, Any]) -> None:
    for run in (*EXACT, "zero3_bf16"):
        first, second = found[run]["next"]
        assert first == pytest.approx(second, rel=1e-6) and first[1] < first[0] < found[run]["losses"][-1]


def test_what_bf16_does_to_the_exact_parameters(found: dict[str, Any]) -> None:
    """``bf16`` casts them with the rest (their master copies stay fp32); ``torch_autocast`` casts no parameter."""
    assert set(found["zero3_bf16"]["dtypes"].values()) == {"torch.bfloat16"}
    assert set(found["zero3_autocast"]["dtypes"].values()) == {"torch.float32"}


@pytest.mark.parametrize("run", [*EXACT, "zero3_bf16", "zero3_autocast"])
def test_zero_to_fp32_makes_a_checkpoint(source: Path, output: Path, run: str, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    same_when_saved(source, get_fp32_state_dict_from_zero_checkpoint(output / run), trained(output, run), tmp_path)


@pytest.mark.parametrize("run", EXACT)
def test_the_gathered_weights_make_a_checkpoint(source: Path, output: Path, run: str, tmp_path: Path) -> None:
    state = torch.load(output / run / "gathered" / "pytorch_model.bin", weights_only=True)
    same_when_saved(source, state, trained(output, run), tmp_path)


def same_when_saved(source: Path, state: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """The weights fit a hybrid, which is saved and loaded as any other; every parameter is as it was trained."""
    model = AutoModelForCausalLM.from_pretrained(source / "my-hybrid")
    model.load_state_dict(state)
    model.save_pretrained(folder)
    for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name]), name


def test_the_page_trains_and_saves(
    source: Path, found: dict[str, Any], chain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippets of docs/ecosystem.md: through the Trainer, saved whole, and again from DeepSpeed's own files."""
    assert len(found["page"]) == 6
    monkeypatch.chdir(source)
    exec(compile(snippets()[1], "docs/ecosystem.md", "exec"), {})
    names = ("my-hybrid", "my-zero3-hybrid", "my-recovered-hybrid")
    start, saved, recovered = (AutoModelForCausalLM.from_pretrained(source / name).eval() for name in names)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, recovered.get_parameter(name)), name
        assert not torch.equal(parameter, start.get_parameter(name)), f"{name} did not move"
    before, after = (model(input_ids=chain, labels=chain).loss for model in (start, saved))
    assert after < 0.8 * before


def test_a_hybrid_without_weights_starts_with_what_mixers_set(found: dict[str, Any]) -> None:
    """Built in parts by ``zero.Init``: A, D and the bias of dt are no module's, so nobody else would set them."""
    one, two = found["fresh"]["mamba1"], found["fresh"]["mamba2"]
    assert one["A_log"] == pytest.approx(torch.arange(1, 17).log().repeat(128).tolist())
    assert all(0 <= value <= 2.7726 for value in two["A_log"]) and len(set(two["A_log"])) == 4
    assert set(one["D"]) == set(two["D"]) == {1.0}
    assert all(-7 < value < -2 for value in two["dt_bias"])
