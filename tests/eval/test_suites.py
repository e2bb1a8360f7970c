"""The usual suites by name from local copies in the hub's own layout: right answers score 1, wrong ones 0."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from distill.config import MeasureConfig
from distill.errors import UserError
from eval import accuracy, local_data, suites
from eval.answers import ENDED, Answer
from eval.lm import LM

COUNT = 4
GENERATIVE = ("gsm8k", "math500", "aime24", "aime25", "amc23", "gpqa_diamond", "arc")
CODE = ("mbpp", "humaneval")
CHOICES = ("hellaswag", "arc", "gpqa_diamond", "mmlu_stem")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asks the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield


def said(task: str, prompt: str) -> str:
    """A right answer, as a model with reasoning gives it."""
    number = re.findall(r"What is (\d+) \+ \d+\?", prompt)
    right = str(2 * int(number[-1])) if number else ""
    if task.startswith("gpqa"):
        choices = dict(re.findall(r"\((.)\) (\d+) m", prompt[prompt.rindex("What is the correct") :]))
        right = f"The answer is ({next(letter for letter, value in choices.items() if value == right)})."
    elif task.startswith("arc"):
        right = " A"
    elif task == "gsm8k":
        right = f"so it is {right}\n#### {right}"
    elif task == "mbpp":
        name = re.findall(r"assert (add_(\d+))", prompt)[-1]
        right = f"def {name[0]}(x):\n    return x + {name[1]}\n"
    elif task == "humaneval":
        right = f"    return x + {re.findall(r'Add (.+)[.]', prompt)[-1]}\n"
    else:
        right = f"Hence $\\boxed{{{right}}}$."
    return f"<think>\nQuestion: 17 or 23? [DONE]\n</think>\n{right}"


class Oracle:
    """Puts right answers, or wrong ones, in place of what the model says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
        self.right, self.prompts = right, dict[str, list[str]]()
        monkeypatch.setattr(LM, "_generate", self.generate)
        monkeypatch.setattr(LM, "loglikelihood", self.loglikelihood)

    def generate(self, lm: LM, batch: list[Any]) -> list[Answer]:
        found = []
        for ask in batch:
            self.prompts.setdefault(ask.task, []).append(ask.text)
            text = said(ask.task, ask.text) if self.right else "<think>2</think>\nno"
            found.append(Answer(ask.reasoning.behind(text) or "", ENDED))
        return found

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        values = []
        for request in requests:
            self.prompts.setdefault(request.task_name, []).append(request.args[0])
            gold = request.doc.get("gold", request.doc.get("answer", 0))
            if isinstance(gold, str):
                gold = ["(A)", "(B)", "(C)", "(D)"].index(gold)
            values.append((-1.0 if (request.idx == gold) == self.right else -9.0, False))
        return values


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Oracle]:
    def make(right: bool) -> Oracle:
        made = Oracle(monkeypatch, right)
        monkeypatch.setattr(LM, "_generate", lambda lm, batch: made.generate(lm, batch))
        monkeypatch.setattr(LM, "loglikelihood", lambda lm, requests, **_: made.loglikelihood(requests))
        return made

    return make


def options(copies: Path, **keys: Any) -> MeasureConfig:
    return MeasureConfig(**{"generative": [], "multiple_choice": [], "local_data": str(copies), **keys})


def test_every_usual_suite_scores_right_answers_and_wrong_ones(
    copies: Path, oracle: Callable[[bool], Oracle], llama: Any, tokenizer: Any
) -> None:
    wanted = options(copies, generative=[*GENERATIVE, *CODE], multiple_choice=list(CHOICES), allow_code_execution=True)
    for right in (True, False):
        made = oracle(right)
        rows = accuracy.evaluate(llama, tokenizer, wanted).rows
        assert {row["task"]: (row["value"], row["n"]) for row in rows} == {
            task: (float(right), COUNT * (19 if task == "mmlu_stem" else 1))
            for task in (
                "gsm8k", "math500", "aime24", "aime25", "amc23", "gpqa_diamond_cot_zeroshot", "arc_challenge_chat",
                "mbpp", "humaneval", "hellaswag", "arc_challenge", "gpqa_diamond_zeroshot", "mmlu_stem",
            )
        }  # fmt: skip
    assert made.prompts["gsm8k"][0].count("Question:") == 6, "five examples, as the task says"
    assert made.prompts["arc_challenge"][0].count("Question:") == 1
    assert "\\boxed{}" in made.prompts["amc23"][0]
    assert {row["task"]: row.get("filter") for row in rows}["gsm8k"] == "flexible-extract"


def test_examples_before_a_question_and_other_samples(
    copies: Path, oracle: Callable[[bool], Oracle], llama: Any, tokenizer: Any
) -> None:
    made = oracle(True)
    wanted = options(copies, generative=["gsm8k"], few_shot={"gsm8k": 2}, samples=3, temperature=0.6)
    (row,) = accuracy.evaluate(llama, tokenizer, wanted).rows
    assert row["samples"] == 3 and row["n"] == COUNT and row["value"] == 1
    assert len(made.prompts["gsm8k"]) == 3 * COUNT
    assert {prompt.count("Question:") for prompt in made.prompts["gsm8k"]} == {3}


def test_a_real_model_goes_through(copies: Path, make_llama: Callable[..., Any], make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.pad_token = tokenizer.eos_token
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)
    wanted = options(copies, generative=["gsm8k", "math500"], multiple_choice=["hellaswag"], max_new_tokens=3, limit=2)
    rows = accuracy.evaluate(model, tokenizer, wanted).rows
    assert [(row["task"], row["n"], row["cut"]) for row in rows] == [
        ("gsm8k", 2, 0), ("math500", 2, 0), ("hellaswag", 2, 0),
    ]  # fmt: skip
    assert all(row["truncated"] + row["empty"] <= 2 for row in rows if row["kind"] == "generative")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("test.jsonl", "test"),
        ("data/val.jsonl", "validation"),
        ("validation/0000.parquet", "validation"),
        ("gpqa_diamond.csv", "train"),
        ("aime_2024_problems.parquet", "train"),
        ("testament.jsonl", "train"),
    ],
)
def test_the_split_that_a_file_says(path: str, split: str) -> None:
    assert local_data._split(Path(path), None) == split


def remove(root: Path, name: str) -> None:
    for path in root.glob(name):
        path.unlink()


@pytest.mark.parametrize(
    ("generative", "choices", "gone", "message"),
    [
        (
            ["gsm8k"],
            [],
            "openai/gsm8k/main/*",
            "no data of 'openai/gsm8k' of its subset 'main', in .*gsm8k/main",
        ),
        (["gsm8k"], [], "openai/gsm8k/main/train*", "the split 'train' of 'openai/gsm8k', and .*main holds test"),
        (["math500"], [], "HuggingFaceH4/MATH-500/*", "task 'math500': no data of 'HuggingFaceH4/MATH-500'"),
        ([], ["mmlu_anatomy"], "cais/mmlu/anatomy/dev*", "the split 'dev' of 'cais/mmlu'"),
        (["humaneval"], [], "evaluate-metric/code_eval/*", "scores with the hub's metric code_eval: copy"),
    ],
)
def test_data_that_are_not_there_are_named_with_their_place(
    generative: list[str], choices: list[str], gone: str, message: str, copies: Path, tmp_path: Path
) -> None:
    for source in copies.rglob("*"):
        if source.is_file() and source.relative_to(copies).parts[1] in {Path(gone).parts[1], "openai_humaneval"}:
            target = tmp_path / source.relative_to(copies)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    remove(tmp_path, gone)
    wanted = options(tmp_path, generative=generative, multiple_choice=choices, allow_code_execution=True)
    with pytest.raises(UserError, match=message):
        accuracy.check(wanted)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="measure.local_data=.*nowhere is no folder"):
        accuracy.check(options(tmp_path / "nowhere", generative=["gsm8k"]))
    with pytest.raises(UserError, match="task 'gsm8k': no folder .*openai/gsm8k: copy the files of the hub's"):
        accuracy.check(options(tmp_path, generative=["gsm8k"]))


def test_without_copies_and_without_the_hub() -> None:
    with pytest.raises(UserError, match="task 'gsm8k': the data set 'openai/gsm8k'(.|\n)*set measure.local_data"):
        accuracy.check(MeasureConfig(generative=["gsm8k"], multiple_choice=[]))


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "HuggingFaceH4/MATH-500").mkdir(parents=True)
    file = tmp_path / "HuggingFaceH4/MATH-500/test.jsonl"
    file.write_text(json.dumps({"problem": "1"}) + "\n{torn")
    with pytest.raises(UserError, match="MATH-500/test.jsonl cannot be read"):
        accuracy.load_tasks("math500", "generative", str(tmp_path))


def test_a_name_in_the_wrong_list() -> None:
    with pytest.raises(UserError, match="'hellaswag' is not scored as generative: name it under measure.multiple_ch"):
        suites.check_tasks(["hellaswag"], "generative", allow_code=False)
    with pytest.raises(UserError, match="task 'arc_easy' is multiple_choice, not generative"):
        suites.check_tasks(["arc_easy"], "generative", allow_code=False)
    with pytest.raises(UserError, match="'embedded_add' is generate_until; likelihoods need a multiple-choice task"):
        suites.check_tasks(["embedded_add"], "multiple_choice", allow_code=False)


@pytest.mark.parametrize(("task", "package"), [("ifeval", "langdetect"), ("ruler", "wonderwords")])
def test_packages_that_a_suite_needs_are_named(task: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=f"task '{task}' needs packages .*: pip install .*{package}"):
        suites.check_tasks([task], "generative", allow_code=False)
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="python -m nltk.downloader punkt_tab"):
        suites.check_tasks([task], "generative", allow_code=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"samples": 4}, "samples=4 at measure.temperature=0 would be the same answer each time"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"few_shot": {"mmlu": 5}}, "few_shot.mmlu: not among the tasks"),
    ],
)
def test_a_sampling_that_could_not_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        accuracy.check(MeasureConfig(**keys))
