"""What stands under each figure and table of a report (HTML)."""

from __future__ import annotations

CAPTIONS = {
    "pareto": (
        "Accuracy against throughput",
        "Up and to the right is better. Filled points are on the Pareto frontier (dashed), hollow ones are "
        "dominated. Bars are one standard error of the mean over the generative tasks, and of speeds the quartiles. "
        "From the step <code>measure</code> of the teacher and of every stage.",
    ),
    "distance": (
        "Accuracy by distance",
        "Per cent of the answers that are right, by how far they must reach. The shade deepens with what is wrong; "
        "bold stands apart from the teacher (95% Wilson intervals that do not meet), any other difference may be "
        "chance. From the step <code>measure</code>; with the intervals in tables/by_distance.csv.",
    ),
    "placement": (
        "Placement",
        "The mixer of every block after every stage. The number in a cell is the stage that converted the "
        "block, in bold where it is new. From the step <code>place</code>.",
    ),
    "loss": (
        "Training",
        "Distillation loss: each step (thin), its running mean (thick), and the loss on held-out tokens "
        "(rings). Tokens count along the lineage. From the step <code>train</code>.",
    ),
    "tuning": (
        "Fine-tuning",
        "Cross-entropy on the traces' own targets: each step (thin), its running mean (thick), and the loss on "
        "held-out tokens before and after (rings). The model is then merged with its stage, alpha * fine-tuned + "
        "(1 - alpha) * stage, and it is the merged one that is measured. From the step <code>sft</code>.",
    ),
    "tasks": (
        "Accuracy by task",
        "Bars with one standard error; hatched bars are stages trained further. Generative tasks first, as the records "
        "list them. From the step <code>measure</code>; with the number of questions in tables/tasks.csv.",
    ),
    "ranks": (
        "Importance",
        "The order of the blocks, by their numbers, in the score of each stage; the most important is at the bottom. "
        "A line that rises or falls is a change of rank among the blocks that are left; it ends where its block was "
        "replaced. From the step <code>score</code>; the scores are in tables/importance.csv.",
    ),
    "throughput": (
        "Throughput against context",
        "Decoded tokens a second at a context of that many tokens: batch over the median time of one step, the band "
        "its quartiles. Teacher and hybrid are timed alternately in one process; the teacher's line is the median of "
        "those runs, its band spans them all. From the step <code>measure</code>.",
    ),
    "prefill": (
        "Prefill",
        "Time to the first token of a whole batch against the length of its prompts, the band its quartiles; prefill "
        "in tokens a second is on hover and in tables/prefill.csv. From the step <code>measure</code>.",
    ),
    "memory": (
        "Memory against sequence length",
        "Bytes of the whole batch: keys and values of the attention blocks, states of the others, and where the record "
        "tells them weights and what a step needs beside. From the step <code>measure</code>.",
    ),
    "cost": (
        "Cost",
        "Wall time of every finished step of every model, the measuring of speed and accuracy included. From "
        "<code>step.json</code> of each step.",
    ),
}
LOO = (
    "Leave-one-out: what {model} ({metric} {baseline}, in per cent) loses when the whole block becomes "
    "the identity, with one standard error. Blocks are replaced in increasing order. "
)
MMR = (
    "MIL-Mamba-replacement: held-out distillation loss with one more block replaced, before and after "
    "{steps} steps of distillation (trainable: {trainable}). Rank 1 costs least and is replaced first; a "
    "crossing is a change of rank. Each side has a scale of its own. Rank correlation between the sides: "
    "{correlation}. "
)
SCORES = {
    "aligned": "Held-out loss with each block by itself swapped for a mixer that has learned ({steps} steps) to give "
    "what its attention gives. Blocks are replaced in increasing order. ",
    "greedy": "Chosen one by one, each beside those before it: the held-out loss once the block is swapped for its "
    "aligned mixer ({steps} steps), of those not chosen what it would have been next. ",
    "kl_restore": "By how much the held-out loss fell when the block got its attention back, in a model whose other "
    "candidates have aligned mixers ({steps} steps); what was not restored is replaced. ",
}
"""Of the other scores that have a text."""
HALVED = "Dashed lines end where halving dropped a candidate; it saved {saved} of the steps. "
HALVING = "Halving would have {changed} the choice, and saved {would_save} of the steps. "
COMPARED = "Rank correlation of other scores with this one: {others}. "
PROTOCOL = (
    "Output tokens a second of whole generations, 1 token in: each model at the same batch, and each at its largest "
    "batch within the same memory (a model without such a line does not fit in it). Ratios are to the teacher timed in "
    "the same run and under the same protocol; "
    "predicted: the ratio of the rooflines; of roofline: the part that is reached of it. From the step "
    "<code>measure</code>."
)
JOINT = (
    "Accuracies in per cent, ± one standard error: the mean over the generative tasks. ● is on the Pareto frontier of "
    "all. vs teacher: against the teacher timed in the same run{protocol}; of models measured elsewhere as their file "
    "says. Tokens count along the lineage. In full precision in {file}."
)
DIFFERENCES = (
    "Keys of the resolved configs that differ (where a run lacks a key, its default counts); where a run lies and what "
    "it is called left out. In tables/differences.csv."
)
COST = (
    "Tokens are those of the row's own training; wall time is of the finished steps. From <code>step.json</code> of "
    "each step; by step in tables/cost.csv."
)
TABLE = (
    "Accuracies in per cent, ± one standard error; a mean stands where all its tasks were measured. ● is "
    "on the Pareto frontier. Tokens/s: output tokens{protocol}; vs teacher: against the teacher timed in "
    "the same run. KV + state: keys and values + states of the other mixers in the cache of the whole batch"
    "{cache}. Tokens count along the lineage; min: minutes of the row's own training. From the steps "
    " <code>measure</code> and <code>train</code>; in full precision in tables/stages.csv."
)
