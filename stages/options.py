"""The options of the verbs that take others than a CONFIG or RUN and key=value."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def traces_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``distill traces``."""
    add = parser.add_argument
    add("--teacher", help="embedded, a model folder, or a hub name")
    add("--prompts", metavar="DATA", help="embedded, or a JSONL file with prompt or messages")
    add("--show", type=int, metavar="N", help="sample nothing: print N packed rows of a CONFIG's data, or of DATA")
    add("target", nargs="?", metavar="CONFIG|RUN", help="whose data --show prints")
    add("overrides", nargs="*", metavar="key=value", help="config values for --show")
    parser.set_defaults(refuse=parser.error)
    add("--output", default="traces.jsonl", metavar="FILE", help="what to write (default: %(default)s)")
    add("--samples", type=int, default=1, metavar="N", help="completions a prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.7, metavar="TAU", help="0: greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, metavar="P", help="mass of the tokens drawn from (default: %(default)s)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longer ones are dropped (default: %(default)s)")
    add("--min-tokens", type=int, default=1, metavar="N", help="shorter ones are dropped (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="B", help="completions at a time (default: %(default)s)")
    add("--limit", type=int, default=0, metavar="N", help="prompts taken (default 0: all; of embedded 256)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: one a core)")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the teacher")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument(
        "--correct-only", dest="keep_wrong", action="store_false", help="drop wrong answers (the default)"
    )
    answers.add_argument("--keep-wrong", action="store_true", help="keep them, marked correct: false")
    parser.set_defaults(keep_wrong=False)
    add("--force", action="store_true", help="begin anew, whatever was written with other settings")


def merge_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill merge``."""
    parser.add_argument("a", metavar="A", help="CHECKPOINT whose config and tokenizer are kept")
    parser.add_argument("b", metavar="B", help="CHECKPOINT of the same architecture and placement")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of A, in [0, 1] (default: 0.5)")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")


def measure_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill measure``."""
    parser.add_argument(
        "target", nargs="+", metavar="CONFIG|RUN|CHECKPOINT...", help="what to measure (see above), and key=value"
    )
    parser.add_argument("--stage", help="of a RUN: H1-5, or its number; by default the first not done")
    parser.add_argument("--gguf", metavar="FILE", help="of a RUN: a GGUF file of --stage, measured beside it")
    parser.add_argument("--config", metavar="CONFIG|RUN", help="of CHECKPOINTs: whose tasks (default: embedded)")
    parser.add_argument("--output", metavar="FILE", help="of CHECKPOINTs: where the records go, as JSON")
    parser.add_argument("--force", action="store_true", help="redo what was made with other inputs, and what follows")
    parser.set_defaults(overrides=[])


def package_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill package``."""
    parser.add_argument("target", metavar="CHECKPOINT|RUN", help="a folder with config.json, a stage's, or a run's")
    parser.add_argument("--stage", help="of a RUN: H1-5, H1-5-SFT, or its number; by default the last distilled")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--code", action="store_true", help="with the Python code that trust_remote_code=True runs")


def export_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill export``."""
    parser.add_argument("target", nargs="?", metavar="CHECKPOINT|RUN", help="a folder with config.json, or a run's")
    parser.add_argument("--to", metavar="FORM", help="hf-native or gguf")
    parser.add_argument("--stage", help="of a RUN: H1-5, H1-5-SFT, or its number; by default the last distilled")
    parser.add_argument("--output", help="the folder, or the file *.gguf, to write; it must not exist")
    parser.add_argument("--dtype", help="of a gguf: f32, f16 or bf16; by default as the checkpoint's weights lie")
    parser.add_argument("--table", action="store_true", help="show what can be exported to what, and why not")


def import_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill import``."""
    parser.add_argument("target", metavar="FOLDER", help="a GraniteMoeHybrid folder")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")


def quantize_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill quantize``."""
    parser.add_argument("target", metavar="GGUF|CHECKPOINT|RUN", help="what to quantise (see above)")
    parser.add_argument("--to", required=True, metavar="TYPE[,TYPE]", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, ...")
    parser.add_argument("--output", required=True, metavar="FILE", help="NAME.gguf; it must not exist")
    parser.add_argument("--only", metavar="COMPONENT", help="quantise mamba, attention or mlp alone (default: all)")
    parser.add_argument("--stage", help="of a RUN: H1-5, H1-5-SFT, or its number; by default the last distilled")
    parser.add_argument("--data", metavar="CONFIG|RUN", help="of a CHECKPOINT: whose data the importance is from")
    parser.add_argument("--imatrix", metavar="FILE", help="read the importance from this file; none: do without")
    parser.add_argument(
        "--tokens", type=int, default=65536, metavar="N", help="to measure the importance on (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: one a core)")


def bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``distill bench``."""
    add = parser.add_argument
    add("targets", nargs="*", metavar="CHECKPOINT|RUN", help="what to measure")
    add("--shape", metavar="CONFIG", default="", help="in their place: random weights, or a prediction, of its teacher")
    add(
        "--h", default="", metavar="H,H", help="of --shape: replaced blocks of each hybrid (default: the teacher alone)"
    )
    add("--mixers", default="", metavar="M,M", help="of --shape: their mixers (default: mamba1,mamba2)")
    add("--device", default="", help="of --shape: predict for this one (h100, a100, ...; this: as measured here)")
    add("--backend", default="hf", help="hf (our decode loop) or vllm (default: %(default)s); GGUF files: llama.cpp")
    add("--batches", default="1,32", metavar="B,B", help="sequences at a time (default: %(default)s)")
    add("--contexts", default="256,1024,4096", metavar="T,T", help="tokens in the cache (default: %(default)s)")
    add("--output-tokens", type=int, default=16384, metavar="N", help="N of 1 in, N out (default: %(default)s)")
    add("--full", action="store_true", help="run the N tokens to the end, in place of integrating step times")
    add("--memory-gb", type=float, default=0.0, metavar="GB", help="what each gets its largest batch within")
    add(
        "--prefill-tokens", type=int, default=4096, metavar="T", help="largest prefill, batch x context (default: 4096)"
    )
    add("--lengths", default="4096,16384,65536,131072", metavar="T,T", help="for memory (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="R", help="(default: %(default)s)")
    add("--dtype", default="", help="float32 or bfloat16 (default: bfloat16 on a GPU)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default 0: one a core)")
    add("--output", default="", metavar="FILE", help="where the JSON record goes (default: the last line of output)")


def report_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``distill report``."""
    parser.add_argument("targets", metavar="CONFIG|RUN", nargs="+", help="one run or several; key=value may follow one")
    parser.add_argument("--external", metavar="CSV", help="models measured elsewhere: name, accuracy, ratio, ...")
    parser.add_argument(
        "--budget", type=float, default=0.95, metavar="SHARE", help="of the teacher's accuracy, to keep (default: 0.95)"
    )
    parser.add_argument("--output", metavar="DIR", help="where to write (default: report/ in the run)")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "traces": traces_options,
    "merge": merge_options,
    "package": package_options,
    "export": export_options,
    "import": import_options,
    "quantize": quantize_options,
    "bench": bench_options,
    "measure": measure_options,
    "report": report_options,
}
"""Verbs with options of their own in place of a target and key=value."""
