"""Run by test_code.py in a process in which neither our packages nor anything of this checkout can be imported.

Reads a file that torch wrote: for each folder what the model in it gives; loads the folder with
``trust_remote_code=True`` and prints one JSON line of what was found.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parents[2])
sys.path = [place for place in sys.path if (place and Path(place).resolve().is_relative_to(sys.prefix))
            or not str(Path(place or ".").resolve()).startswith(HERE)]  # fmt: skip
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
OURS = ("distill", "eval", "stages", "configs")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def same(model: Any, case: dict[str, Any]) -> bool:
    """Whether logits and greedy generation are those of our own classes, bit for bit."""
    for module in model.modules():
        if hasattr(module, "mil_slots"):
            module.kernels = case["kernels"]
    with torch.no_grad():
        logits = model(case["ids"]).logits
        text = model.generate(case["ids"], max_new_tokens=5, do_sample=False, eos_token_id=None)
    return torch.equal(logits, case["logits"]) and torch.equal(text, case["text"])


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def main(cases: str, scratch: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"importable": [name for name in OURS if importlib.util.find_spec(name)]}
    wanted = torch.load(cases)
    plain = wanted.pop("plain")
    numba = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "numba"}
    sys.modules["numba"] = None  # type: ignore[assignment]
    found["without numba"] = same(load(plain["folder"]), plain)
    del sys.modules["numba"]
    sys.modules.update(numba)
    found["same"] = {name: same(load(case["folder"]), case) for name, case in wanted.items()}
    found["of the hub"] = same(load("owner/name"), wanted["qwen3-mamba1"])

    case = wanted["compiled"]
    saved = str(Path(scratch) / "saved")
    model = load(case["folder"])
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(case["folder"], trust_remote_code=True).save_pretrained(saved)
    found["saved"] = same(load(saved), case)
    found["class"] = type(load(saved)).__module__.split(".")[-1]
    generator = pipeline("text-generation", model=saved, trust_remote_code=True)
    (answer,) = generator("add 1+1", max_new_tokens=4, do_sample=False)
    found["pipeline"] = answer["generated_text"]
    found["loaded of ours"] = sorted({name.split(".")[0] for name in sys.modules} & set(OURS))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
