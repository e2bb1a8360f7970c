"""The choice of a kernel: what ``auto`` takes, what is refused and how, what is logged."""

from __future__ import annotations

import importlib.util
import logging
import sys
from typing import Any

import pytest
import torch

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.mixers import available, mixer_class, set_kernels
from distill.ops import causal_conv1d, kernels, selective_scan, split_rows, ssd
from distill.ops.kernels import check_kernel, kernel_of

OPERATORS = {
    "selective_scan": selective_scan.KERNELS,
    "ssd": ssd.KERNELS,
    "causal_conv1d": causal_conv1d.KERNELS,
}


@pytest.fixture
def installed(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are there; every test strikes out what it does without."""
    monkeypatch.setitem(kernels.DEVICES, "mamba_ssm", "cuda")
    monkeypatch.setitem(kernels.DEVICES, "fla", "cuda")
    names = ["numba", "mamba_ssm", "causal_conv1d", "fla"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return names


def chosen(operator: str, asked: str = "auto", device: str = "cuda") -> str:
    kernel_of.cache_clear()
    return kernel_of(operator, OPERATORS[operator], asked, device).__name__.removeprefix(f"distill.ops.{operator}_")


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), ["mamba_ssm", "mamba_ssm", "mamba_ssm"]),
        (("causal_conv1d",), ["mamba_ssm", "mamba_ssm", "reference"]),
        (("mamba_ssm",), ["reference", "fla", "mamba_ssm"]),
        (("mamba_ssm", "fla", "causal_conv1d"), ["reference", "chunked", "reference"]),
    ],
)
def test_auto_on_a_gpu_takes_the_best_that_is_installed(
    installed: list[str], missing: tuple[str, ...], expected: list[str]
) -> None:
    for name in missing:
        installed.remove(name)
    assert [chosen(operator) for operator in OPERATORS] == expected


def test_auto_on_a_cpu_takes_no_package_for_gpus(installed: list[str]) -> None:
    assert [chosen(operator, device="cpu") for operator in OPERATORS] == ["cpu", "cpu", "cpu"]
    installed.remove("numba")
    assert [chosen(operator, device="cpu") for operator in OPERATORS] == ["reference", "chunked", "reference"]


def test_a_package_asked_of_a_model_serves_its_scan_and_what_it_can_beside_it(installed: list[str]) -> None:
    assert [chosen(operator, "mamba_ssm") for operator in OPERATORS] == ["mamba_ssm"] * 3
    assert chosen("ssd", "fla") == "fla"
    assert chosen("causal_conv1d", "fla") == "mamba_ssm"  # fla's scan has the best convolution that there is
    installed.remove("causal_conv1d")
    assert chosen("causal_conv1d", "fla") == "reference"
    with pytest.raises(ValueError, match="'fla' has no kernel for selective scan; allowed: auto, cpu, mamba_ssm"):
        chosen("selective_scan", "fla")


@pytest.mark.parametrize(
    ("operator", "asked", "device", "message"),
    [
        ("ssd", "mamba_sm", "cuda", r"unknown kernel 'mamba_sm' \(did you mean 'mamba_ssm'\?\); allowed: auto, cpu"),
        ("causal_conv1d", "chunked", "cpu", "unknown kernel 'chunked'"),
        ("ssd", "mamba_ssm", "cpu", "'mamba_ssm' needs CUDA tensors, got device 'cpu'; use one of 'auto', 'cpu', 'ch"),
        ("ssd", "cpu", "cuda", "'cpu' needs CPU tensors, got device 'cuda'; use one of 'auto', 'mamba_ssm', 'fla'"),
        ("selective_scan", "mamba_ssm", "cuda", "needs mamba_ssm, which is not installed: pip install mamba-ssm caus"),
        ("causal_conv1d", "mamba_ssm", "cuda", "needs causal_conv1d, which is not installed: pip install mamba-ssm c"),
        ("ssd", "fla", "cuda", "needs fla, which is not installed: pip install flash-linear-attention, or use 'auto'"),
        ("ssd", "cpu", "cpu", "needs numba, which is not installed: pip install numba"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    installed: list[str], operator: str, asked: str, device: str, message: str
) -> None:
    installed.clear()
    with pytest.raises(ValueError, match=message):
        chosen(operator, asked, device)


def test_a_package_that_cannot_be_imported_is_passed_over_by_auto_alone(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", None)
    with caplog.at_level(logging.INFO, logger="distill.ops.kernels"):
        assert chosen("ssd") == "fla"
    lines = [record.getMessage() for record in caplog.records]
    assert "kernel 'mamba_ssm' is installed and cannot be imported (import of mamba_ssm.ops.triton" in lines[0]
    assert lines[1] == "ssd on cuda: kernel 'fla' (asked for 'auto')"
    with pytest.raises(ValueError, match="cannot be imported .*: build it for this PyTorch, or use 'auto'"):
        chosen("ssd", "mamba_ssm")


def test_plain_pytorch_on_a_gpu_is_said_to_be_slow(installed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    installed.clear()
    with caplog.at_level(logging.INFO, logger="distill.ops.kernels"):
        chosen("selective_scan")
        chosen("selective_scan", "reference")  # as was asked for
    assert [record.getMessage() for record in caplog.records] == [
        "selective scan on cuda: kernel 'reference' (asked for 'auto')",
        "selective scan on cuda runs in plain PyTorch, which is slow: pip install mamba-ssm causal-conv1d",
        "selective scan on cuda: kernel 'reference' (asked for 'reference')",
    ]


@pytest.mark.parametrize("asked", kernels.CHOICES)
@pytest.mark.parametrize("mixer", available())
def test_every_choice_serves_every_mixer_or_is_refused(installed: list[str], mixer: str, asked: str) -> None:
    for operator in mixer_class(mixer).operators:
        if (operator, asked) == ("selective_scan", "fla"):
            with pytest.raises(ValueError, match="no kernel for selective scan"):
                check_kernel(operator, asked)
        else:
            check_kernel(operator, asked)
            assert chosen(operator, asked, kernels.DEVICES.get(asked, "cuda"))


@pytest.mark.parametrize(
    ("asked", "placement"),
    [
        ("mamba_ssm", ["mamba2", "attention", "attention", "mamba1"]),
        ("fla", ["mamba2", "attention", "attention", "mamba2"]),
    ],
)
def test_a_whole_model_runs_on_either_package(device: str, llama: Any, asked: str, placement: list[str]) -> None:
    """Packed rows with gradients, and decoding from a prompt in two pieces, as with the plain references."""
    model = hybridize(llama, placement, MixerConfig(), seed=0).to(device)
    rows = torch.randint(5, 40, (2, 20), generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1).to(device)
    found = {}
    for kernel in ("reference", asked):
        set_kernels(model, kernel)
        model.zero_grad()
        logits = model(rows, position_ids=places).logits
        logits.logsumexp(-1).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            first = model(rows[:, :9], use_cache=True)
            second = model(rows[:, 9:], past_key_values=first.past_key_values, use_cache=True)
            third = model(rows[:, :1], past_key_values=second.past_key_values, use_cache=True)
        found[kernel] = [logits.detach(), second.logits, third.logits, *gradients]
    for got, want in zip(found[asked], found["reference"], strict=True):
        torch.testing.assert_close(
            got, want, rtol=2e-3, atol=2e-4 if device == "cpu" else 5e-3 * float(want.abs().max())
        )


@pytest.mark.parametrize(("asked", "mixer"), [("mamba_ssm", "mamba1"), ("mamba_ssm", "mamba2"), ("fla", "mamba2")])
def test_a_step_looks_once_for_where_documents_begin(
    device: str, llama: Any, asked: str, mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybridize(llama, [mixer, mixer, mixer, "attention"], MixerConfig(), seed=0).to(device)
    set_kernels(model, asked)
    rows = torch.randint(5, 40, (2, 20)).to(device)
    places = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1).to(device)
    make, made = split_rows.Documents, []
    monkeypatch.setattr(split_rows, "Documents", lambda *found: made.append(make(*found)) or made[-1])
    model(rows, position_ids=places).logits.sum().backward()
    assert len(made) == 1 and made[0].edges.tolist() == [0, 7, 20, 27, 40]
