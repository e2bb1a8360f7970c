"""Typed configuration: every key, what it means and its default.

``RunConfig`` is one distillation run, ``PretrainConfig`` the training of a teacher from nothing. How files and the
command line are laid over the defaults stands in ``distill/config_merge.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

VERSION = 1
"""Format of ``run.yaml``: raised when a program that knows only the one before could not go on with a run."""


@dataclass(kw_only=True)
class Origin:
    """Where documents come from."""

    source: str = MISSING
    """``embedded``; a file (JSONL, JSON, CSV, Parquet; gzipped JSONL); a folder of such files, or one that
    ``datasets`` saved; or a hub name, ``owner/name``."""
    split: str = "train"
    """Which part of a hub data set, of a saved one, or of a folder whose file names say it."""
    subset: str = ""
    """Configuration of a hub data set that has several."""
    revision: str = ""
    """Branch, tag or commit of a hub data set (empty: its main branch)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What ours are called there, where they have other names: ``{prompt: question, completion: solution}``. Ours are
    messages, conversations, tools, prompt, completion, text."""


@dataclass
class SourceConfig(Origin):
    """One source of a mixture."""

    source: str = MISSING
    """As in ``Origin``."""
    weight: float = 1.0
    """Its share of the rows, which all have as many tokens, relative to the other weights."""


@dataclass
class DataConfig(Origin):
    """What is trained on."""

    source: str = "embedded"
    """As in ``Origin``: rows with messages (or conversations), prompt and completion, or text."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several sources by weight, in place of ``source``; each has its own split, subset, revision and columns."""
    sequence_length: int = 256
    """Tokens a packed row, T."""
    mix: dict[str, float] = field(
        default_factory=lambda: {"add": 1.0, "mod": 1.0, "chase": 2.0, "recall": 2.0, "sort": 1.0}
    )
    """Weight of each embedded family."""
    mask: str = "completion"
    """Which tokens are targets: ``completion`` (the last assistant turn: reasoning and answer), ``assistant`` (every
    assistant turn) or ``all``."""
    too_long: str = "cut"
    """A document longer than a row: ``cut`` (its beginning is kept, every token has its right context), ``split`` (its
    pieces become documents, the later ones without what came before) or ``drop``. All are counted."""
    streaming: bool = False
    """Read, tokenise and pack as the training goes, in bounded memory; a resumed training reads again up to its place.
    Otherwise the documents are held in memory."""
    shuffle_buffer: int = 10_000
    """Documents among which a streamed source is shuffled; with at least as many as there are, the rows are those
    without streaming."""


@dataclass
class TrainConfig:
    """How a model is trained (AdamW, warm-up, then linear decay)."""

    loss: str = "reverse_kl"
    """``reverse_kl``, ``forward_kl``, ``jsd``, ``annealed_kl`` (forward turning into reverse) or ``cross_entropy``; or
    several with weights: ``0.9 reverse_kl + 0.1 cross_entropy``."""
    temperature: float = 1.0
    """tau, applied to both sides."""
    teacher_mode: str = "auto"
    """Where the frozen teacher is: ``whole`` (on every device), ``offload`` (in the CPU's memory, its blocks brought to
    the device one ahead), ``sharded`` (in parts, as DeepSpeed's ZeRO-3 has the student), ``offline`` (its top-k logits
    are written once and read back: an approximation, whose gap is measured), ``auto`` (sharded under ZeRO-3, else
    whole). docs/distillation.md."""
    teacher_top_k: int = 64
    """Logits that ``offline`` keeps a target."""
    steps: int = 100
    """Optimizer steps a stage."""
    steps_by_stage: list[int] = field(default_factory=list)
    """One number a stage, in place of ``steps``."""
    batch_size: int = 8
    """Rows a step, over all processes and accumulation steps."""
    gradient_accumulation: int = 1
    """Micro-batches that a process's share of ``batch_size`` is cut into."""
    learning_rate: float = 5e-5
    mixer_learning_rate: float = 0.0
    """That of the replaced mixers (0: the same)."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta2: float = 0.95
    """Second moment decay of AdamW (the first is 0.9)."""
    max_grad_norm: float = 1.0
    eval_rows: int = 64
    """Held-out rows on which the loss is taken before and after."""
    save_steps: int = 0
    """Checkpoint every so many steps (0: only at the end)."""
    keep_steps: list[int] = field(default_factory=list)
    """Steps of every stage after which the weights are kept for good, in ``train/steps/000200``: models to load,
    or to start a later stage from (those that ``start_from`` names are kept without being listed)."""
    gradient_checkpointing: bool = False
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Rates of groups of parameters that are not to have ``learning_rate``: mixers, body (attention and MLPs),
    embeddings (and the LM head), norms. ``{mixers: 1.0e-3, embeddings: 1.0e-5}``."""
    freeze: list[str] = field(default_factory=list)
    """Groups that are not trained: ``[embeddings, norms]``."""
    keep_checkpoints: int = 2
    """How many checkpoints of a training under way are kept, the newest ones."""
    keep_best: bool = False
    """Keep the weights of the checkpoint with the lowest held-out loss, as a model of its own, in ``train/best``."""
    on_bad_loss: str = "stop"
    """What follows a loss or gradient that is not finite, or a spike: ``stop``, ``skip`` (that step's update is left
    out) or ``roll_back`` (to the newest checkpoint, and the update is left out). The rows are noted."""
    spike: float = 0.0
    """A loss above so many times the median of those before is a spike (0: none is)."""
    data_workers: int = 0
    """Processes that prepare rows beside each process that trains (0: it does so itself). The rows are the same."""


@dataclass
class EngineConfig:
    """What shares a training among the processes that torchrun starts (docs/distributed.md)."""

    name: str = "auto"
    """``auto`` (one process alone, several by ddp), ``none`` (refuses several), ``ddp``, ``deepspeed`` or ``fsdp``."""
    config: str = ""
    """Of deepspeed: ``zero1``, ``zero2``, ``zero3``, ``zero2_offload``, ``zero3_offload``, or a JSON file of its own
    keys (empty: zero3). Of fsdp: ``full`` (everything in parts), ``grad_op`` (weights stay whole between forward and
    backward) or ``offload`` (empty: full)."""
    timeout: float = 600.0
    """Seconds without progress after which a process counts as lost: it is named, and the job ends."""


@dataclass
class SftConfig(Origin):
    """Fine-tuning of a distilled stage on traces, and its merge with that stage (the paper's H1-30-SFT)."""

    source: str = ""
    """Traces, as in ``data.source``, with split, subset, revision and columns of their own (empty: the run's data)."""
    steps: int = 100
    """Optimizer steps; what is not set here (weight decay, clipping, ...) is as in ``train``."""
    batch_size: int = 8
    """Rows a step, over all processes and accumulation steps."""
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    save_steps: int = 0
    """Checkpoint every so many steps (0: only at the end)."""
    alpha: float = 0.5
    """Weight of the fine-tuned model in the merge: alpha * SFT + (1 - alpha) * H1-h."""


@dataclass
class MixerConfig:
    """What replaces attention, and how it starts."""

    name: str = "mamba1"
    blocks: dict[int, str] = field(default_factory=dict)
    """Blocks that get another mixer than ``name`` when they are converted: ``{8: mamba2, 9: mamba2}``."""
    d_state: int = 16
    """State size N (at most head_dim)."""
    d_conv: int = 4
    """Taps of the causal convolution."""
    init: str = "mil"
    """``mil`` (from the attention that is replaced), ``aligned`` (from there regressed to the attention's outputs, as
    ``score.aligned`` says) or ``fresh`` (random)."""
    mil_layout: str = "aligned"
    """``aligned`` or ``faithful``: how keys and values meet queries under GQA."""
    z_init: str = "default"
    """``default`` (random) or ``identity`` (the gate starts at about 1)."""
    conv_init: str = "default"
    """``default`` (random) or ``identity`` (the convolution starts as a pass-through)."""
    bc_norm: str = "auto"
    """RMSNorm per head on B and C: ``auto`` (where the teacher has such norms on k and q), ``always`` or ``never``."""

    def of(self, block: int) -> str:
        """The mixer that ``block`` gets when it is converted."""
        return self.blocks.get(block, self.name)


@dataclass
class LooConfig:
    """Leave-one-out: accuracy lost when a block is the identity."""

    task: str = "embedded_choice"
    """A log-likelihood task of lm-eval."""
    questions: int = 500
    """How many questions (0: all); of a real suite drawn over its subjects, the same for every block and run."""
    few_shot: int = -1
    """Examples before each question (-1: as the task says)."""


@dataclass
class MmrConfig:
    """MIL-Mamba-replacement: loss after a short distillation with one more block swapped."""

    steps: int = 100
    heldout_tokens: int = 16384
    """Fixed held-out tokens on which the loss is taken at 0 steps and after the last."""
    trainable: str = "all"
    """``all`` as in the paper; or cheap: ``block`` (the swapped mixer with its block's MLP and norms) or ``mixer``
    (that alone)."""
    lockstep: bool = True
    """Train all candidates of a cheap variant batch by batch, from one pass of the teacher and one of the current
    model; otherwise one after the other. The scores are the same."""
    candidates_at_once: int = 0
    """Candidates in lockstep (0: as many as fit in the free memory)."""
    halving: bool = False
    """Drop the worse half of the candidates at a quarter and at half of the steps."""
    halving_check: bool = False
    """Drop none, but take the losses then as well, and say what halving would have chosen."""


@dataclass
class RecallDropConfig:
    """What a block costs on recall, over what it costs elsewhere."""

    recall: list[str] = field(default_factory=lambda: ["embedded_choice_recall", "embedded_choice_chase"])
    """Log-likelihood tasks that look something up in their context."""
    rest: list[str] = field(
        default_factory=lambda: ["embedded_choice_add", "embedded_choice_mod", "embedded_choice_sort"]
    )
    """Log-likelihood tasks that do not."""
    questions: int = 500
    """How many questions of each kind (0: all)."""


@dataclass
class AlignedConfig:
    """Aligned mixers: regressed, all at once, to the outputs of the attention that they replace. What ``aligned``,
    ``greedy`` and ``kl_restore`` score with, and what a stage starts from with ``mixer.init: aligned``."""

    steps: int = 100
    learning_rate: float = 3e-3
    """Of AdamW, after a tenth of the steps of warm-up, then falling to 0. A wide model wants less (1e-3 for 3B in the
    code of arXiv:2512.20569), a narrow one bears more."""
    batch_size: int = 0
    """Rows a step (0: ``train.batch_size``)."""
    at_once: int = 0
    """Mixers that are trained together, of which the optimizer's state is held (0: all). It changes no bit of them,
    only how often the current model runs."""
    heldout_tokens: int = 16384
    """Fixed held-out tokens on which the KL of every candidate is taken."""


@dataclass
class ScoreConfig:
    """Which importance score each stage uses (docs/importance.md says which at which cost)."""

    first: str = "loo"
    """Of stages that start from the teacher."""
    later: str = "mmr"
    """Of all others."""
    blocks: list[int] = field(default_factory=list)
    """Candidates (empty: every block that still has attention)."""
    compare: list[str] = field(default_factory=list)
    """Other scores to take of the same candidates, which choose nothing; their rank correlation with the one that does
    is recorded. A score, with options of its own: ``[loo, mmr trainable=mixer]``."""
    loo: LooConfig = field(default_factory=LooConfig)
    mmr: MmrConfig = field(default_factory=MmrConfig)
    aligned: AlignedConfig = field(default_factory=AlignedConfig)
    recall_drop: RecallDropConfig = field(default_factory=RecallDropConfig)
    given: list[int] = field(default_factory=list)
    """Of ``given``: blocks in the order in which to replace them, at least as many as the last stage replaces."""
    combine: list[str] = field(default_factory=list)
    """Of ``combine``: the scores whose ranks are averaged, at least two: ``[loo, mmr]``."""


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


@dataclass
class SlurmConfig:
    """Where and how the jobs of a run work (``distill submit``); what a site sets once for all stands in a file of
    ``configs/cluster``."""

    cluster: str = ""
    """Such a file, by its short name or path; its keys are those of this section, and what a config sets itself stands
    above them."""
    partition: str = ""
    light_partition: str = ""
    """That of jobs that need no GPU (empty: ``partition``)."""
    account: str = ""
    qos: str = ""
    time: str = "24:00:00"
    """Limit of one job. A training is asked for a checkpoint before it and goes on in a new start."""
    light_time: str = "01:00:00"
    """That of jobs that need no GPU."""
    nodes: int = 1
    """Nodes of a training; every other job takes one."""
    gpus_per_node: int = 0
    """GPUs of a training on each node (0: it trains on the CPU); scoring and measuring take one."""
    gres: str = ""
    """GPUs as the site names them, ``gpu:h100``, asked for by ``--gres`` with their number (empty:
    ``--gpus-per-node``)."""
    cpus_per_task: int = 2
    """Cores of a training on each node; a job of one GPU takes its share of them."""
    memory: str = "0"
    """Of a training, a node (``0``: all of the node's)."""
    task_memory: str = ""
    """Of any other job that works on a model (empty: as the site gives it)."""
    light_memory: str = "8G"
    """Of jobs that work on none."""
    modules: list[str] = field(default_factory=list)
    """Loaded first: ``module load ...``."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before the step (activation of an environment, variables)."""
    container: str = ""
    """What a command is put behind to run in a container: ``apptainer exec --nv /images/distill.sif``."""
    python: str = ""
    """The Python of the jobs (empty: the one that submits; in a container ``python``)."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, for every job: ``--constraint=h100``."""
    srun: list[str] = field(default_factory=list)
    """Further options of the srun that starts a training."""
    grace: int = 300
    """Seconds before the limit (or, where the site sends it, before a preemption) at which a training is asked for a
    checkpoint: enough for one step and one checkpoint."""
    requeues: int = 100
    """How often a training may go on in a new start."""
    candidates_at_once: int = 0
    """Candidates of one importance score that are worked on side by side (0: as many as the cluster takes)."""


@dataclass
class TrackingConfig:
    """Who else gets the training logs (TensorBoard's files are always written, ``RUN/tensorboard``)."""

    wandb: str = ""
    """Project of Weights & Biases to log to (empty: none); needs the package ``wandb``."""


@dataclass
class PlanConfig:
    """What ``distill plan`` assumes of a device."""

    device_tflops: float = 0.0
    """Peak TFLOP/s of one device (0: measure this machine)."""
    utilisation: float = 0.4
    """Share of the peak that training reaches (MFU)."""
    device_memory: float = 0.0
    """GB of one device, which a step must fit in (0: of this machine's GPU, or without one not checked)."""
    device: str = ""
    """The device that ``target`` is predicted for, such as ``h100``; ``this`` is measured (empty: h100 for bfloat16,
    else this one)."""
    records: list[str] = field(default_factory=list)
    """Run folders whose measured speeds count for ``target`` before predicted ones."""


@dataclass
class RunConfig:
    """One run: a teacher taken through a schedule of hybrids."""

    name: str = "run"
    teacher: str = "embedded"
    """``embedded``, a model folder, or a hub name."""
    teacher_config: dict[str, Any] = field(default_factory=dict)
    """The teacher's config.json, for planning without it at hand."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the teacher (``auto_map`` in its config.json) may be run."""
    schedule: list[int] = field(default_factory=list)
    """Replaced blocks h after each stage; each stage more than what it starts from."""
    target: str = ""
    """A speed in place of the last h: ``1.8x at 16k`` (so many times the teacher's, one token in and 16,384 out, at the
    largest of ``measure.throughput.batches``; ``..., batch 64`` and ``..., equal memory`` say otherwise). h is the
    smallest that reaches it; stages before it are those of ``schedule`` that are below."""
    start_from: dict[str, str] = field(default_factory=dict)
    """Where a stage starts, if not from the stage before it: ``H1-5`` (an earlier stage), ``H1-5@200`` (its weights
    after 200 steps), ``teacher``, or the folder of a hybrid that another run made. ``{H1-7: H1-5@200}``."""
    run_dir: str = "runs/run"
    seed: int = 0
    threads: int = 0
    """CPU threads (0: one a core)."""
    dtype: str = "float32"
    """``float32`` or ``bfloat16``: the teacher, and what is computed in; the student trains on float32 weights."""
    kernels: str = "auto"
    """``auto``, ``reference``, ``cpu``, ``mamba_ssm`` or ``fla``: the implementation of the mixers' operators (which
    runs where: docs/kernels.md)."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PretrainConfig:
    """A teacher trained from nothing on the embedded traces."""

    name: str = "teacher"
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of a config.json; ``model_type`` says of which family (by default ``llama``)."""
    start: str = ""
    """A model to go on from (``embedded``, a folder), in place of random weights."""
    output: str = "runs/teacher"
    seed: int = 0
    threads: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
