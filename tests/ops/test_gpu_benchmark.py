"""The benchmark of the CUDA kernels: what it says without a GPU, and every row of it at a tiny shape."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import HEAD, OPERATORS, Row, Shape, line, measure

TINY = Shape(channels=16, states=4, groups=2, heads=2, width=4)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main() == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("distill.ops.kernels._installed", lambda package: package != "causal_conv1d")
    assert gpu_kernels.main() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "needs a CUDA device" in first
    assert "causal_conv1d, which is not installed: pip install mamba-ssm causal-conv1d" in second


def test_every_row_is_measured(stand_ins: None) -> None:
    rows = list(measure(list(OPERATORS), [1, 2], [3], TINY, torch.float32, "cpu"))
    found = [(row.operator, row.kernel, row.what) for row in rows if row.batch == 2]
    passes = ("forward", "forward + backward", "one token")
    ssd = [("ssd", kernel, what) for what in passes for kernel in ("mamba_ssm", "fla")]
    rest = [(name, "mamba_ssm", what) for name in ("selective_scan", "causal_conv1d") for what in passes]
    assert sorted(found) == sorted(ssd + rest)
    assert all((row.ratio is None) == (row.kernel == "fla") for row in rows)
    assert all(row.documents_ms for row in rows if row.what != "one token")


def test_a_row_lines_up_under_the_head() -> None:
    row = line(Row("selective_scan", "mamba_ssm", "forward + backward", 8, 16384, 1.8, 2.0, None, 2.5))
    assert len(row) == len(HEAD.removesuffix("   (ms)"))
    assert row.split()[-5:] == ["1.800", "2.000", "0.90", "-", "2.500"]
