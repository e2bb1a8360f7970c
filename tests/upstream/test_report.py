"""The report on transformers' own checks: every case is counted once, and every reason for a skip is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

RESULTS = """<testsuites><testsuite>
<properties><property name="transformers" value="5.23.0"/><property name="placements" value="mixed (mamba2)"/>
<property name="left out: PipelineTesterMixin" value="needs the hub"/></properties>
<testcase classname="tests.upstream.checks.Test_llama_mixed" name="test_save" time="1.0"/>
<testcase classname="tests.upstream.checks.Test_llama_mixed" name="test_gpu" time="0.5">
  <skipped message="HybridLlamaForCausalLM needs a GPU"/></testcase>
<testcase classname="tests.upstream.checks.Test_qwen3_mixed" name="test_gpu" time="0.5">
  <skipped message="HybridQwen3ForCausalLM needs a GPU"/></testcase>
<testcase classname="tests.upstream.checks.Test_qwen3_mixed" name="test_save" time="58.0">
  <failure message="1 != 2"/></testcase>
</testsuite></testsuites>"""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("report", Path(__file__).with_name("report.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_counts_every_check_and_gives_every_reason(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    lines = load().main([str(tmp_path / "results.xml")] * 2).splitlines()
    assert "| llama | mixed | 1 | 0 | 1 |" in lines and "| qwen3 | mixed | 0 | 1 | 1 |" in lines
    assert "| **all** |  | 1 | 1 | 2 |" in lines
    assert "| the model needs a GPU | 2 | `gpu` |" in lines, "one reason, whichever class it was given for"
    assert "- `qwen3 mixed test_save`" in lines
    assert "| PipelineTesterMixin | needs the hub |" in lines
    assert (
        "- transformers: 5.23.0" in lines
        and "- 4 checks in 1 minutes, 2 different ones, of which 1 run somewhere" in lines
    )
