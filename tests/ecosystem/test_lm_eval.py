"""lm-eval's command line on a saved hybrid: its scores are what the model says."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = [{"question": f"{n}+{n + 2}=", "choices": [str(2 * n + 2), str(n)]} for n in range(6)]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATE = """\
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
target_delimiter: ""
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def arguments(folder: Path, *more: str) -> list[str]:
    """What a user writes after the program's name."""
    model = ["--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu", "--batch_size", "4"]
    return ["run", *model, "--output_path", str(folder / "out.json"), "--log_samples", *more]


def results(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What lm-eval wrote: the results, and the samples of each task."""
    (path,) = folder.glob("out_*.json")
    samples = {
        path.name.split("_2")[0].removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("samples_*.jsonl")
    }
    return json.loads(path.read_text())["results"], samples


@pytest.fixture
def checkpoint(make_hybrid: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A saved hybrid with its tokenizer."""
    make_hybrid("mamba2").save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


@pytest.fixture
def local_tasks(tmp_path: Path) -> list[str]:
    """The arguments that name two tasks made here."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=tmp_path / "data.jsonl"))
    return ["--tasks", "local_choice,local_generate", "--include_path", str(tmp_path)]


def test_scores_are_the_models_own(
    make_hybrid: Any, tokenizer: Any, checkpoint: Path, local_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods and generations of tasks that are found by name; the command line runs in this process."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments(checkpoint, *local_tasks)])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # it sets this itself, and would leave it so
    monkeypatch.chdir(checkpoint)
    runpy.run_module("distill.lm_eval", run_name="__main__")
    scores, samples = results(checkpoint)

    model, right = make_hybrid("mamba2"), 0
    encode = lambda text: torch.tensor([tokenizer.encode(text, add_special_tokens=False)])  # noqa: E731
    with torch.no_grad():
        for document, chosen, said in zip(DOCUMENTS, samples["local_choice"], samples["local_generate"], strict=True):
            prompt, likelihoods = encode(document["question"]), []
            for choice in document["choices"]:
                ids = torch.cat([prompt, encode(choice)], 1)
                likely = model(ids).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
                likelihoods.append(float(likely.gather(1, ids[0, prompt.shape[1] :, None]).sum()))
            seen = [float(score) for score, _ in chosen["filtered_resps"]]
            assert seen == pytest.approx(likelihoods, abs=1e-3)
            right += likelihoods[0] > likelihoods[1]
            new = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
            assert said["filtered_resps"] == [tokenizer.decode(new, skip_special_tokens=True)]
    assert scores["local_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))


@pytest.mark.slow
def test_lm_eval_alone_does_not_know_hybrids(checkpoint: Path, local_tasks: list[str]) -> None:
    """What the module is there for: lm-eval makes the model before it reads a task that is given by name."""
    program = str(Path(sys.executable).parent / "lm_eval")
    environment = {"PATH": str(Path(program).parent), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [program, *arguments(checkpoint, *local_tasks)]
    done = subprocess.run(command, cwd=checkpoint, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "does not recognize this architecture" in done.stderr
