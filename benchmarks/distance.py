"""Accuracy by distance of a checkpoint on more held-out questions than the suite has: hops, pairs, columns, digits.

    python benchmarks/distance.py embedded --questions 1500 --families chase recall

Greedy, exact match after the reasoning. Prints one line a family; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distill  # noqa: F401
from distill.data.families import FAMILIES
from distill.data.suite import generative
from distill.teacher import load_model, load_tokenizer
from stages.cli import quiet

BATCH = 300
LONGEST = 96  # tokens of the longest right completion, and some


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--questions", type=int, default=600, help="a family")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args()
    quiet()
    model, tokenizer = load_model(args.checkpoint), load_tokenizer(args.checkpoint)
    tokenizer.padding_side = "left"
    report: dict[str, dict[int, dict[str, float]]] = {}
    for family in args.families:
        asked, right = Counter[int](), Counter[int]()
        questions = generative(family, args.questions)
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            chats = [[{"role": "user", "content": question["prompt"]}] for question in batch]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            ).to(model.device)
            outputs = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for question, text in zip(batch, texts, strict=True):
                asked[question["distance"]] += 1
                right[question["distance"]] += text.split("</think>")[-1].strip() == question["answer"]
        report[family] = {d: {"accuracy": right[d] / asked[d], "n": asked[d]} for d in sorted(asked)}
        figures = "  ".join(f"{d}: {100 * row['accuracy']:.1f}% of {row['n']}" for d, row in report[family].items())
        print(f"{family:7s} {100 * right.total() / asked.total():.1f}%   by distance  {figures}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
