"""Local copies of the usual suites' data, a few rows each in the hub's own layout and columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from lm_eval import tasks

Rows = Sequence[dict[str, Any]]


def subjects() -> list[str]:
    """MMLU's 57 subjects, as lm-eval names them."""
    folder = Path(tasks.__file__).parent / "mmlu/default"
    return [path.stem.removeprefix("mmlu_") for path in sorted(folder.glob("mmlu_*.yaml"))]


def parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(str(path))


def jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def sums(count: int, start: int = 0) -> list[tuple[str, int]]:
    """(question, answer) pairs."""
    return [(f"What is {i} + {i}?", 2 * i) for i in range(start, start + count)]


def mmlu(count: int, subject: str) -> list[dict[str, Any]]:
    return [
        {"question": q, "subject": subject, "choices": [str(a), str(a + 1), str(a + 2), str(a + 3)], "answer": i % 4}
        for i, (q, a) in enumerate(sums(count))
    ]


def arc(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"Mercury_{i}",
            "question": q,
            "choices": {"text": [str(a), str(a + 1), str(a + 2), str(a + 3)], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        }
        for i, (q, a) in enumerate(sums(count))
    ]


def hellaswag(count: int) -> list[dict[str, Any]]:
    return [
        {
            "ind": i,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["starts pulling up roofing.", "is using wrap.", "is ripping tiles.", "holds a cube."],
            "source_id": f"activitynet~{i}",
            "split": "val",
            "split_type": "indomain",
            "label": "0",
        }
        for i in range(count)
    ]


def gpqa(count: int) -> list[dict[str, Any]]:
    return [
        {
            "Question": q,
            "Correct Answer": f"{a} m",
            "Incorrect Answer 1": f"{a + 1} m",
            "Incorrect Answer 2": f"{a + 2} m",
            "Incorrect Answer 3": f"{a + 3} m",
            "Subdomain": "Physics",
            "Record ID": f"rec{i}",
        }
        for i, (q, a) in enumerate(sums(count))
    ]


def mbpp(count: int) -> list[dict[str, Any]]:
    return [
        {
            "task_id": 11 + i,
            "text": f"Write a function to add {i}.",
            "code": f"def add_{i}(x):\r\n  return x + {i}",
            "test_list": [f"assert add_{i}({x}) == {x + i}" for x in range(3)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for i in range(count)
    ]


def humaneval(count: int) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(x: int) -> int:\n    """ Add {i}. """\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(count)
    ]


CODE_EVAL = '''\
"""A stand-in for the hub's metric of this name, with its arguments and its form of result."""
import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        feature = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(feature))

    def _compute(self, predictions, references, k=(1, 10, 100), num_workers=4, timeout=3.0):
        import os
        if os.getenv("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("not allowed")
        def passes(code):
            try:
                exec(code, {})
            except BaseException:
                return 0
            return 1
        right = [sum(passes(c + "\\n" + test) for c in each) / len(each) for each, test in zip(predictions, references)]
        return {"pass@1": sum(right) / len(right)}, {}
'''


def write_copies(root: Path, count: int = 4) -> Path:
    """Every suite's files below ``root``, ``count`` questions each, laid out as the hub's repositories are."""
    disable_progress_bars()
    gsm8k = [{"question": q, "answer": f"{a / 2:g} + {a / 2:g} = {a}\n#### {a}"} for q, a in sums(count + 6)]
    for split, rows in (("train", gsm8k[count:]), ("test", gsm8k[:count])):
        parquet(root / f"openai/gsm8k/main/{split}-00000-of-00001.parquet", rows)
    for subject in subjects():
        parquet(root / f"cais/mmlu/{subject}/test-00000-of-00001.parquet", mmlu(count, subject))
        parquet(root / f"cais/mmlu/{subject}/dev-00000-of-00001.parquet", mmlu(5, subject))
    jsonl(
        root / "HuggingFaceH4/MATH-500/test.jsonl",
        [
            {
                "problem": q,
                "solution": f"It is $\\boxed{{{a}}}$.",
                "answer": str(a),
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/algebra/{i}.json",
            }
            for i, (q, a) in enumerate(sums(count))
        ],
    )
    parquet(
        root / "Maxwell-Jia/AIME_2024/aime_2024_problems.parquet",
        [{"ID": f"2024-I-{i}", "Problem": q, "Solution": "", "Answer": a} for i, (q, a) in enumerate(sums(count))],
    )
    jsonl(
        root / "math-ai/aime25/test.jsonl",
        [{"problem": q, "answer": str(a), "id": str(i)} for i, (q, a) in enumerate(sums(count))],
    )
    parquet(
        root / "math-ai/amc23/data/test-00000-of-00001.parquet",
        [{"id": i, "question": q, "answer": f"{a}.0", "url": ""} for i, (q, a) in enumerate(sums(count))],
    )
    table(root / "Idavidrein/gpqa/gpqa_diamond.csv", gpqa(count))
    table(root / "Idavidrein/gpqa/gpqa_main.csv", gpqa(count + 3))
    for split in ("train", "test", "validation", "prompt"):
        parquet(root / f"google-research-datasets/mbpp/full/{split}-00000-of-00001.parquet", mbpp(count))
    parquet(root / "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet", humaneval(count))
    for split in ("train", "test", "validation"):
        for subset in ("ARC-Challenge", "ARC-Easy"):
            parquet(root / f"allenai/ai2_arc/{subset}/{split}-00000-of-00001.parquet", arc(count))
    for split in ("train", "validation"):
        parquet(root / f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet", hellaswag(count))
    jsonl(
        root / "google/IFEval/ifeval_input_data.jsonl",
        [
            {
                "key": 1000 + i,
                "prompt": "Write a sentence without commas.",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            }
            for i in range(count)
        ],
    )
    metric = root / "evaluate-metric/code_eval/code_eval.py"
    metric.parent.mkdir(parents=True)
    metric.write_text(CODE_EVAL)
    return root


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of copies (``measure.local_data``) of every suite; not to be changed."""
    return write_copies(tmp_path_factory.mktemp("copies"))


@pytest.fixture
def own_copies(tmp_path: Path) -> Callable[..., Path]:
    """``own_copies(count)``: a folder of copies that a test may change."""
    return lambda count=4: write_copies(tmp_path / "copies", count)
