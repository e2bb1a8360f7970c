"""The model card of a hybrid: Markdown with the front matter that model hubs read, a pure function of the facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distill.data.sources import EMBEDDED
from distill.hub.facts import Facts
from distill.placement import ATTENTION

PAPER = "[Apriel-H1](https://arxiv.org/abs/2511.02651)"
PROJECT = "distill-hybrid"
"""Our package, as pip knows it."""
CODE_LIBRARY = "transformers"


def card(facts: Facts, title: str, *, code: bool) -> str:
    """The text of README.md for a model called ``title``; ``code``: whether the code comes with it."""
    parts = [
        f"---\n{front_matter(facts, title, code=code)}\n---\n",
        f"# {title}\n",
        what(facts),
        section("How to load it", loading(facts, title, code=code)),
        section("What was measured", measured(facts)),
        section("How it was made", made(facts)),
        section("Limits", limits(facts)),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def front_matter(facts: Facts, title: str, *, code: bool) -> str:
    """The YAML that hubs read: library, base model, license, tags, and the measured results as a model index."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(entry["task"]),
            dataset_name=str(entry["task"]),
            metric_type=str(entry.get("metric", "accuracy")),
            metric_value=round(100 * float(entry["value"]), 2),
            metric_name=f"{entry.get('metric', 'accuracy')} (%){spread(entry)}",
        )
        for entry in facts.accuracy
        if entry.get("value") is not None
    ]
    mixers = sorted(set(facts.mixers) - {ATTENTION})
    data = ModelCardData(
        library_name=CODE_LIBRARY if code else PROJECT,
        pipeline_tag="text-generation",
        base_model=facts.teacher if "/" in facts.teacher else None,
        license=facts.license or None,
        tags=["distill", "hybrid", "distillation", *mixers],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def spread(entry: Mapping[str, Any]) -> str:
    """``, stderr 1.40, 100 questions``, as far as it is known."""
    text = f", stderr {100 * float(entry['stderr']):.2f}" if entry.get("stderr") is not None else ""
    return text + (f", {int(entry['n'])} questions" if entry.get("n") else "")


def section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text.rstrip()}\n" if text else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def what(facts: Facts) -> str:
    """One paragraph, and the placement."""
    blocks, kinds = len(facts.mixers), sorted(set(facts.mixers) - {ATTENTION})
    mixers = " or ".join(f"{kind} ({facts.mixers.count(kind)})" if len(kinds) > 1 else kind for kind in kinds)
    of = f" of {teacher(facts)}" if facts.teacher else ""
    size = f" {facts.parameters:,} parameters." if facts.parameters else ""
    text = (
        f"{facts.name}: an attention-Mamba hybrid{of} ({facts.family}), in which {len(facts.replaced)} of {blocks} "
        f"blocks have {mixers or 'other'} mixers in place of attention, after {PAPER}. The rest is of the "
        f"teacher's own design.{size}\n"
    )
    runs = [(mixer, [block for block, _ in group]) for mixer, group in groupby(enumerate(facts.mixers), lambda x: x[1])]
    spans = [[f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]), mixer] for mixer, run in runs]
    options = ", ".join(f"{key} {value}" for key, value in sorted(facts.options.items()))
    return (
        f"{text}\n" + table(["blocks (from 0)", "mixer"], spans) + (f"\nMixer options: {options}.\n" if options else "")
    )


def teacher(facts: Facts) -> str:
    """What the teacher is called."""
    return "the teacher embedded in distill" if facts.teacher == EMBEDDED else f"`{facts.teacher}`"


def loading(facts: Facts, title: str, *, code: bool) -> str:
    """A snippet that runs where the folder lies in the working directory, or on a hub under its name."""
    name, trust = json.dumps(title, ensure_ascii=False), ", trust_remote_code=True" if code else ""
    first = "" if code else "import distill  # registers the architecture\n"
    prompt = (
        'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "..."}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True\n)'
        if facts.chat
        else 'tokenizer("...", return_tensors="pt")'
    )
    how = (
        "The Python files beside the weights are all that transformers needs, besides torch; with numba installed the "
        f"scans run compiled on a CPU. Where `pip install {PROJECT}` is at hand, its own code is used."
        if code
        else f"Needs `pip install {PROJECT}`: no serving tool holds this architecture by itself."
    )
    return f"""{how}

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}{trust})
tokenizer = AutoTokenizer.from_pretrained({name}{trust})
inputs = {prompt}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```
"""


def measured(facts: Facts) -> str:
    """Accuracy beside the teacher's, throughput, bytes of the cache."""
    if not facts.accuracy and not facts.headline:
        return "Nothing yet (`distill measure` measures accuracy and throughput beside the teacher's)."
    lines = []
    if facts.accuracy:
        theirs = {(entry["task"], entry.get("metric")): entry for entry in facts.teachers_accuracy}
        rows = [
            [
                f"{entry['task']} ({entry.get('metric', 'accuracy')}, {kind(entry)})",
                percent(entry),
                percent(theirs.get((entry["task"], entry.get("metric")), {})),
                f"{int(entry['n']):,}" if entry.get("n") else "",
            ]
            for entry in facts.accuracy
        ]
        lines.append("Accuracy in per cent ± one standard error.\n")
        lines.append(table(["task", facts.name, "teacher", "questions"], rows))
    head = facts.headline
    if head.get("ratio"):
        lines.append(
            f"Throughput: {head['ratio']:.2f} times the teacher's, timed side by side in one run: "
            f"{head['tokens_per_second']:,.0f} against {head['teacher_tokens_per_second']:,.0f} output tokens/s, batch "
            f"{head['batch']}, 1 token in and {head['output_tokens']:,} out. Tokens/s are those of the machine that it "
            "was measured on; the ratio depends on machine, batch and length.\n"
        )
    lines += cache(facts)
    return "\n".join(lines)


def cache(facts: Facts) -> list[str]:
    """Bytes of keys, values and states at the largest batch and its longest context that were timed."""
    rows = {}
    for who in ("teacher", "hybrid"):
        own = [row for row in facts.speeds if (row["model"] == "teacher") == (who == "teacher")]
        rows[who] = max(own, key=lambda row: (row["batch"], row["context"]), default={})
    if any(row.get("kv_bytes") is None for row in rows.values()):
        return []
    mib = lambda row, key: f"{(row.get(key) or 0) / 2**20:,.1f}"  # noqa: E731
    at = f"batch {rows['hybrid']['batch']}, {rows['hybrid']['context']:,} tokens of context"
    cells = [[who, mib(row, "kv_bytes"), mib(row, "state_bytes")] for who, row in rows.items()]
    return [f"Cache in MiB, {at}:\n", table(["model", "keys and values", "states"], cells)]


def kind(entry: Mapping[str, Any]) -> str:
    return str(entry.get("kind", "")).replace("_", " ")


def percent(entry: Mapping[str, Any]) -> str:
    """``98.0 ± 1.4``; a hyphen for what is not known."""
    if entry.get("value") is None:
        return "-"
    return f"{100 * entry['value']:.1f}" + (
        f" ± {100 * entry['stderr']:.1f}" if entry.get("stderr") is not None else ""
    )


def made(facts: Facts) -> str:
    """The trainings along the lineage, with tokens, losses, data and seeds."""
    if not facts.lineage:
        return "Not recorded in this checkpoint."
    rows = []
    for record in facts.trainings or facts.lineage:
        start, end = record.get("eval_loss_start"), record.get("eval_loss_end")
        losses = f"{start:.4f} → {end:.4f}" if isinstance(start, float) and isinstance(end, float) else ""
        cells = [record.get(key) for key in ("name", "steps", "tokens", "data", "loss")]
        shown = [f"{cell:,}" if isinstance(cell, int) else str(cell if cell is not None else "") for cell in cells]
        rows.append([*shown, losses, str(record.get("seed", ""))])
    text = (
        "Stage by stage: the attention mixers that matter least are replaced by ones that start from their weights, "
        f"then the whole is distilled from the teacher. {facts.tokens:,} tokens along the lineage:\n\n"
    )
    header = ["training", "steps", "tokens", "data", "loss", "held-out before → after", "seed"]
    used = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return text + table(header, rows) + (f"\nMade with {used}.\n" if used else "")


def limits(facts: Facts) -> str:
    """What the records let us say, and what they do not."""
    lengths = [record["sequence_length"] for record in facts.trainings if record.get("sequence_length")]
    found = [
        "A mixer's state has a fixed size: what has to be recalled over long distances is where a hybrid loses first, "
        "and log-likelihood tasks hide what generation shows. Measure on the task that it is meant for.",
        "It learned from its teacher, on the data named above, and has the teacher's faults and biases."
        if facts.lineage
        else "Nothing records that it was trained since mixers were replaced; it has the teacher's faults and biases.",
    ]
    if lengths:
        longest = f"Trained on rows of at most {max(lengths):,} tokens"
        found.append(f"{longest}; the config allows {facts.context:,} positions." if facts.context else f"{longest}.")
    if facts.dtype:
        found.append(f"Weights are stored in {facts.dtype}; compute in float32 or bfloat16, not float16.")
    if "mamba1" in facts.mixers:
        found.append("No serving tool (llama.cpp, vLLM) holds mamba1 mixers: it runs through transformers.")
    return "".join(f"- {line}\n" for line in found)
