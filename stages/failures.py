"""What a verb's failure is to the user: the message, and the exit code.

2 for what the user can mend: bad input, no memory, a full disk, no network, a missing package. 1 for a bug of ours.
"""

from __future__ import annotations

import traceback

from distill.errors import UserError, brief, out_of_memory

LINES, COLUMNS = 5, 600
OURS = ("distill", "eval", "stages")
PACKAGES = {"lm_eval": "lm-eval", "yaml": "pyyaml", "sklearn": "scikit-learn"}
"""Names on PyPI of modules that are called otherwise."""
NETWORK = ("huggingface_hub", "httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3", "aiohttp")
MORE = "; or a machine with more memory"
TRAINING = (
    "raise {0}.gradient_accumulation (what is held at once is {0}.batch_size / that), lower data.sequence_length, or "
    "set train.gradient_checkpointing=true"
)
KNOBS = {
    "score": f"for loo set dtype=bfloat16; for mmr {TRAINING.format('train')}",
    "train": TRAINING.format("train"),
    "sft": TRAINING.format("sft"),
    "pretrain": TRAINING.format("train"),
    "measure": "lower measure.batch_size, measure.throughput.batches or measure.throughput.contexts",
    "bench": "lower --batches, --contexts or --output-tokens",
    "traces": "lower --batch-size or --max-new-tokens",
    "swap": "set dtype=bfloat16",
}
"""What to turn where a verb's memory does not suffice."""


def explain(verb: str, error: Exception) -> tuple[int, str]:
    """Exit code and message (at most `LINES` lines) for whatever ended a verb."""
    code, text = 2, _explained(verb, error)
    if text is None:
        code, text = (
            1,
            (
                f"this is a bug of distill, not of your input: {type(error).__name__}: {brief(error)}{_place(error)}\n"
                "run the command again with --debug and report what it shows; what is finished stands"
            ),
        )
    lines = [line if len(line) <= COLUMNS else f"{line[: COLUMNS - 4]} ..." for line in text.split("\n")]
    shown = "\n".join(lines[:LINES])
    return code, "".join(each if each.isprintable() or each == "\n" else " " for each in shown)


def _explained(verb: str, error: Exception) -> str | None:
    """What went wrong and what to do, or None for what should never happen."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        step = _verb_in(error) or verb
        knob = KNOBS.get(step, "set dtype=bfloat16")
        return f"out of memory in {step}: {brief(error, 160)}\n{knob}{MORE}; what is finished stands"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in OURS:
        module = error.name.split(".")[0]
        return f"the package {module} is not installed: pip install {PACKAGES.get(module, module)}"
    origin = type(error).__module__.split(".")[0]
    unfound = type(error).__name__ == "DatasetNotFoundError"  # what `datasets` says without a network
    if origin in NETWORK or unfound or isinstance(error, (ConnectionError, TimeoutError)):
        return (
            f"not to be had from the network, nor from the cache: {brief(error)}\n"
            "check the name and the connection; where there is none, download it before (HF_HOME says where to)"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or brief(error)}: {brief(str(error.filename))}; what is finished stands"
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return "a path begins with ~ and the name of no user: write ~/ for your home, or the whole path"
    return None


def _verb_in(error: BaseException) -> str | None:
    """The verb whose module was at work, innermost first: ``distill run`` goes through several."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    verbs = [name.removeprefix("stages.") for name in names if name.startswith("stages.")]
    return next((verb for verb in reversed(verbs) if verb in KNOBS), None)


def _place(error: BaseException) -> str:
    """Where in our own code it happened."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for package in OURS:
            _, found, rest = frame.filename.rpartition(f"/{package}/")
            if found:
                return f" ({package}/{rest}, line {frame.lineno})"
    return ""
