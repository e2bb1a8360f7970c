"""The mixers' speed beside others' references and beside attention, over sequence length, and how far off the roofline.

    make bench-mixers                                   # fetches mamba-ssm's sources, then runs this: some ten minutes
    python benchmarks/mixers.py --threads 2 --plot docs/mixers.png

One run, one process, float32, by default one thread (the references' thousands of small operators do not gain from
more). *scan*: forward and backward of the operator alone, on equal operands, against mamba-ssm's ``selective_scan_ref``
and the loop in transformers' Mamba. *mixer*: a whole mixer with its projections, against SDPA attention of the same
width (the embedded teacher's: hidden 128, 4 query and 2 key/value heads of 32). *decode*: one token of a whole mixer.
Times are the fastest of several runs, of the references' two. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from mixers_plot import draw
from peers import mamba_ssm
from torch import Tensor
from transformers import LlamaConfig, MambaConfig
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan

import distill  # noqa: F401
from distill.config import MixerConfig
from distill.hybrid.model import FAMILIES
from distill.mixers import mixer_class
from distill.ops.selective_scan import selective_scan, selective_scan_update
from distill.ops.ssd import ssd
from eval.backends.hf import InPlaceLayer
from eval.machine import Machine, fastest

LENGTHS = [2**power for power in range(7, 15)]  # 128 ... 16k
AT = 2048  # the length of the figures that the last line gives
STATES = 16
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
HEADS, WIDTH = 4, 32
INNER = HEADS * WIDTH


def both_ways(function: Callable[..., Tensor], *operands: Tensor) -> Callable[[], None]:
    """A run of ``function`` forward and backward to every operand."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    direction: list[Tensor] = []

    def run() -> None:
        y = function(*leaves)
        if not direction:
            direction.append(torch.randn_like(y))
        torch.autograd.backward(y, direction[0])
        for leaf in leaves:
            leaf.grad = None

    return run


def scan_operands(length: int, groups: int = INNER // STATES) -> list[Tensor]:
    """x, dt, A, B, C, D of `selective_scan`, batch 1."""
    torch.manual_seed(0)
    dt = torch.rand(1, length, INNER) * 0.1 + 1e-3
    B, C = torch.randn(2, 1, length, groups, STATES)
    return [torch.randn(1, length, INNER), dt, -torch.rand(INNER, STATES) * 16, B, C, torch.ones(INNER)]


def ssd_operands(length: int) -> list[Tensor]:
    """x, dt, A, B, C, D of `ssd`, batch 1."""
    torch.manual_seed(0)
    x, B, C = torch.randn(3, 1, length, HEADS, WIDTH)
    return [x, torch.rand(1, length, HEADS) * 0.1 + 1e-3, -torch.rand(HEADS) * 16, B, C, torch.ones(HEADS)]


def scans(lengths: Sequence[int], longest_reference: int) -> list[dict[str, Any]]:
    """Seconds of forward + backward of the scan alone: ours, and the two references up to ``longest_reference``."""
    theirs = mamba_ssm("ops/selective_scan_interface.py").selective_scan_ref
    rows = []
    for length in lengths:
        x, dt, A, B, C, D = scan_operands(length)
        row: dict[str, Any] = {"length": length}
        row["mamba1"] = fastest(both_ways(lambda *o: selective_scan(*o)[0], x, dt, A, B, C, D), 1)
        row["mamba2"] = fastest(both_ways(lambda *o: ssd(*o)[0], *ssd_operands(length)), 1)
        if length <= longest_reference:
            flat = [t.transpose(1, 2).contiguous() for t in (x, dt)]
            grouped = [t.permute(0, 2, 3, 1).contiguous() for t in (B, C)]
            row["mamba_ssm_ref"] = fastest(both_ways(theirs, *flat, A, *grouped, D), 1, least=2)
            one = [t[:, :, 0].transpose(1, 2).contiguous() for t in (B, C)]  # transformers knows one group
            row["transformers"] = fastest(both_ways(mamba_selective_scan, *flat, A, *one, D), 1, least=2)
            check_same(x, dt, A, B, C, D, theirs(*flat, A, *grouped, D))
        say(row)
        rows.append(row)
    return rows


def check_same(*operands_and_result: Tensor) -> None:
    """That what is timed computes the same."""
    *operands, theirs = operands_and_result
    ours = selective_scan(*operands)[0].transpose(1, 2)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        sys.exit(f"the references disagree by {float((ours - theirs).abs().max())}")


def hybrid_config() -> Any:
    config = FAMILIES["llama"][0](**SHAPE, num_hidden_layers=2, mixers=["attention", "attention"])
    config._attn_implementation = "sdpa"
    return config


def modules() -> dict[str, torch.nn.Module]:
    """One mixer of each kind, of equal width."""
    torch.manual_seed(0)
    config = hybrid_config()
    peer = MambaConfig(hidden_size=INNER, expand=1, state_size=STATES, conv_kernel=MixerConfig().d_conv)
    built = {name: mixer_class(name)(config, 0) for name in ("mamba1", "mamba2")}
    return built | {"attention": LlamaAttention(config, 0), "transformers": MambaMixer(peer, 0).eval()}


def rotary(first: int, count: int) -> Any:
    embedding = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))
    return embedding(torch.zeros(1), torch.arange(first, first + count)[None])


def first_output(module: torch.nn.Module, more: dict[str, Any], hidden: Tensor) -> Tensor:
    output = module(hidden, **more)
    return output if isinstance(output, Tensor) else output[0]


def mixers(lengths: Sequence[int], longest_reference: int) -> list[dict[str, Any]]:
    """Seconds of forward + backward of whole mixers, to their input and parameters."""
    rows = []
    for length in lengths:
        hidden, positions = torch.randn(1, length, 128), rotary(0, length)
        row: dict[str, Any] = {"length": length}
        for name, module in modules().items():
            if name == "transformers" and length > longest_reference:
                continue
            more = {"position_embeddings": positions, "attention_mask": None} if name == "attention" else {}
            call = both_ways(partial(first_output, module, more), hidden)
            row[name] = fastest(call, 1, least=2 if name == "transformers" else 3)
        say(row)
        rows.append(row)
    return rows


@torch.no_grad()
def decoding(contexts: Sequence[int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of one token of a whole mixer with its cache; attention reads ``context`` keys and values."""
    rows = []
    for batch in batches:
        one, seconds = torch.randn(batch, 1, 128), {}
        for name in ("mamba1", "mamba2", "transformers"):
            module, cache = modules()[name], Cache(layers=[LinearAttentionLayer()])
            key = "cache_params" if name == "transformers" else "past_key_values"
            module(one.expand(-1, 4, -1), **{key: cache})
            seconds[name] = fastest(partial(module, one, **{key: cache}), 0.5)
        seconds["mamba_ssm_ref_update"], seconds["mamba1_update"] = updates(batch)
        for context in contexts:
            module, layer = modules()["attention"], InPlaceLayer(context)
            positions, cache = rotary(context - 1, 1), Cache(layers=[layer])
            module(one, position_embeddings=positions, attention_mask=None, past_key_values=cache)

            def step() -> None:
                layer.move_to(context - 1)  # noqa: B023
                module(one, position_embeddings=positions, attention_mask=None, past_key_values=cache)  # noqa: B023

            step()
            rows.append({"batch": batch, "context": context, "attention": fastest(step, 0.5), **seconds})
            say(rows[-1])
    return rows


def updates(batch: int) -> tuple[float, float]:
    """The update of the scan alone: mamba-ssm's reference and ours."""
    theirs = mamba_ssm("ops/triton/selective_state_update.py").selective_state_update_ref
    x, dt, A, B, C, D = scan_operands(1)
    single = [t[:, 0].repeat(batch, *[1] * (t.ndim - 2)) for t in (x, dt, B, C)]
    state = torch.zeros(batch, INNER, STATES)
    wide = [t.repeat_interleave(STATES, 1) for t in single[2:]]  # its groups are heads of channels: here one a channel
    heads = [t.unsqueeze(-1) for t in (state.clone(), single[0], single[1])]
    heads[0] = state.clone().unsqueeze(2)
    slow = fastest(lambda: theirs(heads[0], heads[1], heads[2], A[:, None], *wide, D[:, None]), 0.5)
    return slow, fastest(lambda: selective_scan_update(state, single[0], single[1], A, single[2], single[3], D), 0.5)


def memory(name: str, length: int) -> float:
    """Peak bytes that forward + backward of a scan need beyond its inputs, over the inputs' bytes; all is counted, the
    output, its gradient and those of the inputs included (by themselves 1.5 times the inputs of mamba1, 1.7 of mamba2).
    For a process of its own, in whose memory nothing has been freed."""
    make, function = {"mamba1": (scan_operands, selective_scan), "mamba2": (ssd_operands, ssd)}[name]
    both_ways(lambda *o: function(*o)[0], *make(64))()  # compiles
    leaves = [operand.requires_grad_() for operand in make(length)]
    before = resident()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):  # the kernels release the GIL
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    y = function(*leaves)[0]
    y.backward(torch.ones_like(y))
    peak = max(peak, resident())
    done.set()
    watcher.join()
    return (peak - before) / sum(leaf.nbytes for leaf in leaves)


def resident() -> int:
    """Bytes of this process in memory."""
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


def memory_of(name: str, threads: int) -> float:
    """`memory` at the greatest length, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def scan_roofline(machine: Machine, length: int) -> float:
    """Least seconds of forward + backward of mamba1's scan: each state's decay is an exponential, made again in
    backward; x, dt, B, C are read twice, y, dy and four gradients written or read once."""
    states = length * INNER * STATES
    return machine.seconds(exps=2 * states, nbytes=4 * length * INNER * (2 * 4 + 2 + 4), flops=14 * states)


def exponent(rows: Sequence[dict[str, Any]], name: str, shortest: int = 512) -> float:
    """The power of the length that the time grows with, by least squares of the logarithms."""
    points = [(row["length"], row[name]) for row in rows if row["length"] >= shortest and name in row]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0])


def crossover(rows: Sequence[dict[str, Any]], name: str, by: str) -> float | None:
    """From where on ``name`` is faster than attention, straight between the points measured; None: nowhere."""
    gains = [(row[by], np.log(row["attention"] / row[name])) for row in rows]
    if gains[0][1] >= 0:
        return float(gains[0][0])
    for (left, before), (right, after) in pairwise(gains):
        if before < 0 <= after:
            return float(np.exp(np.interp(0, [before, after], np.log([left, right]))))
    return None


def say(row: dict[str, Any]) -> None:
    parts = [f"{key} {value}" if isinstance(value, int) else f"{key} {1e3 * value:.3f}" for key, value in row.items()]
    print("  " + "  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longest-reference", type=int, default=AT, help="the references' backward is quadratic")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--memory", choices=["mamba1", "mamba2"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(memory(args.memory, LENGTHS[-1]))
        return
    began = time.perf_counter()
    machine = Machine.measure()
    print(f"{machine}\nscan, forward + backward, ms (batch 1, {INNER} channels, {STATES} states)")
    scan_rows = scans(LENGTHS, args.longest_reference)
    print("mixer, forward + backward, ms (batch 1, hidden 128)")
    mixer_rows = mixers(LENGTHS, args.longest_reference)
    print("decode, one token, ms")
    decode_rows = decoding(LENGTHS, (1, 32))
    at = next(row for row in scan_rows if row["length"] == AT)
    result = {
        "threads": args.threads,
        "scan_speedup_vs_mamba_ssm_ref": at["mamba_ssm_ref"] / at["mamba1"],
        "scan_speedup_vs_transformers": at["transformers"] / at["mamba1"],
        "length_exponent": exponent(scan_rows, "mamba1"),
        "length_exponents": {name: exponent(mixer_rows, name) for name in ("mamba1", "mamba2", "attention")},
        "roofline_fraction": scan_roofline(machine, AT) / at["mamba1"],
        "extra_memory": {name: memory_of(name, args.threads) for name in ("mamba1", "mamba2")},
        "training_crossover": {name: crossover(mixer_rows, name, "length") for name in ("mamba1", "mamba2")},
        "decode_crossover": {
            f"{name} batch {batch}": crossover([r for r in decode_rows if r["batch"] == batch], name, "context")
            for name in ("mamba1", "mamba2")
            for batch in (1, 32)
        },
        "seconds": time.perf_counter() - began,
    }
    if args.plot:
        args.plot.write_bytes(draw(scan_rows, mixer_rows, decode_rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
