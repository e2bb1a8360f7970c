"""Accuracy and throughput."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ThroughputConfig:
    """Decode speed: batches x contexts, and the headline of 1 token in, N out."""

    batches: list[int] = field(default_factory=lambda: [1, 32])
    contexts: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    repeats: int = 5
    output_tokens: int = 4096
    """N of the 1-in / N-out throughput (the paper: 16k)."""
    full: bool = False
    """Run the N tokens to the end, in place of integrating the step times at the contexts."""
    memory_gb: float = 0.0
    """What each model gets its largest batch within, in GB (0: nine tenths of a GPU's memory; on CPU what the teacher
    takes at the largest of the batches)."""
    prefill_tokens: int = 4096
    """Prompts are measured up to so many tokens, batch times context (0: none)."""
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536, 131072])
    """Lengths of a sequence for which the memory is given."""


@dataclass
class MeasureConfig:
    """Accuracy tasks and throughput."""

    generative: list[str] = field(default_factory=lambda: ["embedded_generative"])
    """Tasks whose answers are generated: names of usual suites (gsm8k, math500, ...) or of lm-eval's tasks."""
    multiple_choice: list[str] = field(default_factory=lambda: ["embedded_choice"])
    """Tasks whose choices are scored by their likelihood."""
    local_data: str = ""
    """A folder of copies of the tasks' data, laid out as on the hub (``DIR/openai/gsm8k/main/test.parquet``), in place
    of the hub."""
    limit: int = 0
    """Questions a task (0: all)."""
    few_shot: dict[str, int] = field(default_factory=dict)
    """Examples before each question, by task, where others than the task says: ``{mmlu: 5}``."""
    batch_size: int = 64
    """Sequences at a time; halved where memory does not suffice."""
    max_new_tokens: int = 0
    """Longest generation (0: as each task says); one that is longer is counted as truncated."""
    temperature: float = 0.0
    """Of generated answers (0: as each task says, which is greedy)."""
    top_p: float = 1.0
    """Mass of the likeliest tokens that are drawn from."""
    samples: int = 1
    """Answers to each generative question; its score is their mean (pass@1)."""
    reasoning_start: str = "<think>"
    """What begins a model's reasoning: where it has begun and not ended, there is no answer yet."""
    reasoning_end: str = "</think>"
    """What ends it: the text behind it is matched (empty: all of the text)."""
    allow_code_execution: bool = False
    """Whether tasks that run what the model writes (humaneval, mbpp) may do so on this machine."""
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
