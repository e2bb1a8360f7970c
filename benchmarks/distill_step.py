"""One step of distillation beside TRL's trainer, Liger's chunked loss and the plain loss over full logits.

    make bench-distill                                # fetches liger-kernel, then runs this
    python benchmarks/distill_step.py --tokens 1024 --vocabularies 32768

One run, float32 on CPU, same teacher, student, batch and optimizer: a Llama of 8 blocks of width 512 with tied
embeddings, and its hybrid with every second mixer swapped; rows of 1,024 tokens whose first eighth is a prompt. *loss*:
forward and backward of reverse KL alone, from hidden states to their gradient and that of the student's head. *step*:
teacher, student, loss, backward, AdamW. Every figure comes from a process of its own, the contenders in turn; of the
loss alone it is as many runs as begin in 40 seconds. Times are the fastest; beside them stands for how long cores were
busy, which other work on the machine hardly changes. Peak memory is the process's largest resident size, models and
libraries included.

All get what a step has: hidden states of every token, and labels in which those of the prompt are ignored. TRL:
``DistillationTrainer`` at beta 1 (its trainer's loss, which leaves the ignored out as ours does; generation left out).
Liger: ``LigerFusedLinearJSDLoss`` at beta 1 in its own chunks, as it is (*liger*), and with its torch.compile, where
there is a C++ compiler (*liger_compiled*): it projects what is ignored too, and then masks it. *liger_targets* is the
latter for a caller who picks the targets out by himself, and counts as a peer. The plain loss is handed the targets
only. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LIGER = Path(os.environ.get("LIGER", ROOT / ".venv" / "liger"))
CONTENDERS = ("ours", "trl", "liger", "plain", *(["liger_compiled", "liger_targets"] if shutil.which("g++") else []))
PEERS = tuple(name for name in CONTENDERS if name not in ("ours", "plain"))
AS_THEY_COME = tuple(name for name in PEERS if name != "liger_targets")
STEPPERS = tuple(name for name in CONTENDERS if name not in ("liger", "liger_targets"))
"""Those whose whole step is measured: of Liger's the faster."""
IGNORED = -100
LENGTH, PROMPT, WIDTH, BLOCKS = 1024, 128, 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a batch, in rows of 1,024")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--rounds", type=int, default=1, help="processes a figure")
    parser.add_argument("--repeats", type=int, default=2, help="runs a process, at least, after one to warm up")
    parser.add_argument("--seconds", type=float, default=40, help="of the loss alone: as many runs as begin in these")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "WHO", "VOCABULARY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, who, vocabulary = args.one
        print(json.dumps(measure(what, who, int(vocabulary), args)))
        return
    if not LIGER.is_dir():
        sys.exit(f"{LIGER} is not there: run 'make bench-distill', which fetches liger-kernel")
    began = time.perf_counter()
    results = {str(vocabulary): compare(vocabulary, args) for vocabulary in args.vocabularies}
    print(
        json.dumps({"threads": args.threads, "tokens": args.tokens, **results, "seconds": time.perf_counter() - began})
    )


def compare(vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one vocabulary: the ratios that the last line gives, and what they are made of."""
    found: dict[str, dict[str, dict[str, float]]] = {"loss": {}, "step": {}}
    for what, contenders in (("loss", CONTENDERS), ("step", STEPPERS)):
        for turn in range(args.rounds):
            for who in contenders[:: -1 if turn % 2 else 1]:  # there and back
                new = one(what, who, vocabulary, args)
                old = found[what].setdefault(who, new)
                old.update({key: min(old[key], new[key]) for key in new if key not in ("value", "parameters")})
        values = {who: row["value"] for who, row in found[what].items()}
        if max(values.values()) - min(values.values()) > 1e-4 * max(values.values()):
            sys.exit(f"the contenders compute different losses: {values}")
        for who, row in found[what].items():
            figures = f"{row['seconds']:9.2f} s  (cores busy {row['busy']:8.2f} s){row['peak'] / 2**20:9,.0f} MiB"
            print(f"  V {vocabulary:7,}  {what}  {who:14s}{figures}", flush=True)
    loss, step = found["loss"], found["step"]
    busy = loss["ours"]["busy"]
    return {
        "loss_speed_ratio_best_peer": min(loss[who]["seconds"] for who in PEERS) / loss["ours"]["seconds"],
        "loss_speed_ratio_as_they_come": min(loss[w]["seconds"] for w in AS_THEY_COME) / loss["ours"]["seconds"],
        "loss_speed_ratio": {who: loss[who]["seconds"] / loss["ours"]["seconds"] for who in CONTENDERS[1:]},
        "loss_busy_ratio_best_peer": min(loss[who]["busy"] for who in PEERS) / loss["ours"]["busy"],
        "loss_share_of_products": loss["ours"]["products"] / busy,
        "products_ratio_mm": loss["ours"]["products_mm"] / loss["ours"]["products"],
        "tokens_per_s_ratio_trl": step["trl"]["seconds"] / step["ours"]["seconds"],
        "tokens_per_s": {who: args.tokens / row["seconds"] for who, row in step.items()},
        "peak_memory_ratio_plain": step["ours"]["peak"] / step["plain"]["peak"],
        "peak_memory_mib": {who: round(row["peak"] / 2**20) for who, row in step.items()},
        "parameters": step["ours"]["parameters"],
    }


def one(what: str, who: str, vocabulary: int, args: argparse.Namespace) -> dict[str, float]:
    """A figure from a process of its own."""
    options = {"threads": args.threads, "tokens": args.tokens, "repeats": args.repeats, "seconds": args.seconds}
    command = [sys.executable, __file__, "--one", what, who, str(vocabulary)]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} of {who} at {vocabulary:,} failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, who: str, vocabulary: int, args: argparse.Namespace) -> dict[str, float]:
    """In the process of one figure: least seconds, peak bytes, the loss, and what else the comparison wants."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if who.startswith("liger"):
        sys.path.append(str(LIGER))
    run, more = (loss_alone if what == "loss" else whole_step)(who, vocabulary, args.tokens)
    value = run()  # warms up; the first step starts from the same weights for all
    times, spent = [], []
    while len(times) < args.repeats or (what == "loss" and sum(times) < args.seconds):
        began, busy = time.perf_counter(), time.process_time()
        run()
        times.append(time.perf_counter() - began)
        spent.append(time.process_time() - busy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if what == "loss" and who == "ours":
        more |= products(vocabulary, args.tokens)
    return {"seconds": min(times), "busy": min(spent), "peak": peak, "value": value, **more}


def products(vocabulary: int, tokens: int) -> dict[str, float]:
    """Least busy seconds of the four matrix products that any exact loss makes, each at this chunk and vocabulary: by
    oneDNN where we take it, and by PyTorch's ``mm`` alone, as the peers do."""
    import torch

    from distill.loss_chunks import in_slices, tokens_of_chunk
    from distill.ops.linear_cpu import linear

    n = targets_of(tokens)
    few = tokens_of_chunk(vocabulary, n)
    slices = in_slices(vocabulary, few)
    many = min(n, 512)
    h, weight, logits = torch.randn(many, WIDTH), torch.randn(vocabulary, WIDTH), torch.randn(many, vocabulary)
    parts, gradient = [logits[:few, columns].contiguous() for columns in slices], torch.zeros(vocabulary, WIDTH)

    def each_slice(product: Callable[[slice, Any], Any]) -> None:
        for columns, part in zip(slices, parts, strict=True):
            product(columns, part)

    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "logits": (few, lambda: each_slice(lambda at, _: linear(h[:few], weight[at]))),
        "hidden": (few, lambda: each_slice(lambda at, part: linear(part, weight[at].T))),
        "head": (few, lambda: each_slice(lambda at, part: gradient[at].addmm_(part.T, h[:few]))),
        "logits_mm": (many, lambda: torch.mm(h, weight.T, out=logits)),
        "hidden_mm": (many, lambda: torch.mm(logits, weight, out=h)),
        "head_mm": (many, lambda: gradient.addmm_(logits.T, h)),
    }
    each = {}
    for name, (rows, call) in calls.items():
        call()
        times, start = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() < start + 2:
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        each[name] = min(times) * n / rows
    return {
        "products": 2 * each["logits"] + each["hidden"] + each["head"],
        "products_mm": 2 * each["logits_mm"] + each["hidden_mm"] + each["head_mm"],
    }


def targets_of(tokens: int) -> int:
    """Valid targets of a batch: what follows each row's prompt."""
    return tokens // LENGTH * (LENGTH - PROMPT)


def loss_alone(who: str, vocabulary: int, tokens: int) -> tuple[Callable[[], float], dict[str, float]]:
    """A run of the loss, forward and backward."""
    import torch
    from torch import nn

    teacher_hidden = torch.randn(tokens // LENGTH, LENGTH, WIDTH)
    hidden = (teacher_hidden + 0.3 * torch.randn_like(teacher_hidden)).requires_grad_()
    head, teacher_head = (nn.Linear(WIDTH, vocabulary, bias=False) for _ in range(2))
    nn.init.normal_(teacher_head.weight, std=WIDTH**-0.5).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(teacher_head.weight).add_(torch.randn_like(head.weight), alpha=0.2 * WIDTH**-0.5)
    targets = torch.randint(vocabulary, hidden.shape[:2])
    targets[:, :PROMPT] = IGNORED

    def run() -> float:
        hidden.grad = head.weight.grad = None
        value = loss_of(who, hidden, head, teacher_hidden, teacher_head, targets)
        value.backward()
        return float(value.detach())

    return run, {}


def loss_of(who: str, hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, targets: Any) -> Any:
    """Mean reverse KL over the targets [B, T] that are not ignored, of the hidden states [B, T, E] that predict them:
    as ``who`` computes it."""
    import torch
    from torch.nn import functional as F

    valid = targets != IGNORED
    if who == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        return _chunked_divergence_loss(
            hidden, teacher_hidden, head.weight, teacher_head.weight, valid.long(), beta=1.0
        )[0]
    if who in ("liger", "liger_compiled"):
        valid = torch.ones_like(valid)
    rows, others, targets = hidden[valid], teacher_hidden[valid], targets[valid]
    if who == "ours":
        from distill.losses import build_loss, head_logits, loss_through_head

        with head_logits(others, teacher_head) as teacher:
            return loss_through_head(
                build_loss("reverse_kl"), rows, head, teacher, targets, temperature=1.0, count=len(targets)
            )
    if who.startswith("liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        options = {"beta": 1.0, "ignore_index": IGNORED, "compiled": who != "liger"}
        jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
        return jsd(rows, head.weight, others, teacher_head.weight, targets)
    log_q = F.log_softmax(head(rows), -1)
    with torch.no_grad():
        log_p = F.log_softmax(teacher_head(others), -1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / len(targets)


def whole_step(who: str, vocabulary: int, tokens: int) -> tuple[Callable[[], float], dict[str, float]]:
    """A run of a whole training step."""
    import torch

    import distill  # noqa: F401
    from distill.config import MixerConfig
    from distill.hybrid.surgery import hybridize
    from distill.teacher import Teacher

    model = llama(vocabulary)
    student = hybridize(model, ["mamba2", "attention"] * (BLOCKS // 2), MixerConfig(name="mamba2"), seed=0).train()
    ids = torch.randint(vocabulary, (tokens // LENGTH, LENGTH))
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    teacher = Teacher(model)
    inputs = {"input_ids": ids, "position_ids": torch.arange(LENGTH).expand_as(ids).contiguous()}
    if who == "trl":
        loss = trl_loss(student, model, ids)
    elif who == "ours":
        loss = our_loss(student, teacher, inputs, labels)
    else:
        loss = partial(other_loss, who, student, teacher, inputs, labels)

    def run() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return run, {"parameters": sum(parameter.numel() for parameter in student.parameters())}


def llama(vocabulary: int) -> Any:
    """The teacher, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": WIDTH // 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape, **heads, **special)
    return LlamaForCausalLM(config).eval()


def our_loss(student: Any, teacher: Any, inputs: dict[str, Any], labels: Any) -> Callable[[], Any]:
    """Our trainer's loss of the batch."""
    from distill.config import TrainConfig
    from distill.trainer import DistillTrainer, training_arguments

    arguments = training_arguments(TrainConfig(batch_size=len(labels)), 10, Path(tempfile.mkdtemp()), 0)
    extra: dict[str, Any] = {"teacher": teacher, "loss": "reverse_kl", "temperature": 1.0}
    trainer = DistillTrainer(model=student, args=arguments, **extra)
    count = (labels[:, 1:] != IGNORED).sum()
    return lambda: trainer.compute_loss(student, {**inputs, "labels": labels}, num_items_in_batch=count)


def other_loss(who: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: Any) -> Any:
    """The loss of a contender that has no trainer, inside our student's forward."""

    def objective(hidden: Any, head: Any) -> Any:
        return loss_of(who, hidden[:, :-1], head, states_of_teacher[:, :-1], teacher.head, labels[:, 1:])

    states_of_teacher = teacher.hidden(inputs)
    return student(**inputs, use_cache=False, objective=objective).loss


def trl_loss(student: Any, teacher: Any, ids: Any) -> Callable[[], Any]:
    """The loss of TRL's trainer, of the batch as it has it after generation."""
    import torch
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from distill.data.tokenizer import build_tokenizer

    arguments = DistillationConfig(
        output_dir=tempfile.mkdtemp(), beta=1.0, temperature=1.0, per_device_train_batch_size=len(ids), report_to=[],
        bf16=False, use_cpu=True, gradient_checkpointing=False, max_completion_length=LENGTH - PROMPT,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=arguments, processing_class=build_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * len(ids)),
    )  # fmt: skip
    inputs = {"prompt_ids": ids[:, :PROMPT], "completion_ids": ids[:, PROMPT:]}
    inputs |= {name.replace("ids", "mask"): torch.ones_like(tensor) for name, tensor in inputs.items()}
    inputs["num_items_in_batch"] = torch.tensor(float(inputs["completion_ids"].numel()))
    return lambda: trainer.compute_loss(student.train(), inputs)


if __name__ == "__main__":
    main()
