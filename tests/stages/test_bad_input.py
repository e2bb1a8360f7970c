"""Bad input: (command, what the message must say) -> exit code 2, one message of at most five lines, no traceback,
and nothing written that was not there. What a name after ``{tmp}/`` stands for is in conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants

from stages import cli, measure, plan, swap, train
from stages.cli import main
from stages.failures import COLUMNS, LINES

Build = Callable[[list[str]], list[str]]
Capture = pytest.CaptureFixture[str]

RUN = ["run", "demo", "run_dir={tmp}/new"]
PLAN = ["plan", "demo"]
TINY = ["run", "{tiny}/tiny.yaml", "run_dir={tmp}/new"]

CONFIG_FILES = [
    (["run", "dmeo"], "did you mean 'demo'"),
    (["run", "{tmp}/missing.yaml"], "no config"),
    (["plan", "{tmp}/missing.yaml"], "give a YAML file or one of"),
    (["run", "{tmp}/empty.yaml"], "found nothing"),
    (["run", "{tmp}/comment.yaml"], "found nothing"),
    (["run", "{tmp}/list.yaml"], "found a list"),
    (["run", "{tmp}/word.yaml"], "unknown key 'demo'"),
    (["run", "{tmp}/number.yaml"], "found int"),
    (["run", "{tmp}/broken.yaml"], "line 2, column 3 is not YAML"),
    (["run", "{tmp}/tab.yaml"], "line 2, column 1 is not YAML"),
    (["run", "{tmp}/tab.yaml"], "spaces, not tabs"),
    (["run", "{tmp}/binary.yaml"], "is not YAML"),
    (["run", "{tmp}/latin.yaml"], "UTF-8"),
    (["run", "{tmp}/twice.yaml"], "duplicate key seed"),
    (["run", "{tmp}/two.yaml"], "is not YAML"),
    (["run", "{tmp}/python.yaml"], "is not YAML"),
    (["run", "{tmp}/bomb.yaml"], "10000"),
    (["run", "{tmp}/itself.yaml"], "itself.yaml"),
    (["run", "{tmp}/deep.yaml"], "nested too deeply"),
    (["run", "{tmp}/typo.yaml"], "did you mean 'train'"),
    (["run", "{tmp}/nested.yaml"], "did you mean 'steps'"),
    (["run", "{tmp}/type.yaml"], "expected a whole number"),
    (["run", "{tmp}/null.yaml"], "train"),
    (["run", "{tmp}/newer.yaml"], "written by a newer distill (version 99"),
    (["run", "{tmp}/version.yaml"], "version='one'"),
    (["run", "{tmp}/config.txt"], "ends in .yaml"),
    (["run", "{tmp}/folder.yaml"], "no run folder"),
    (["run", "{tmp}/dangling.yaml"], "there is no such file"),
    (["run", "{tmp}"], "is no run folder"),
    (["pretrain", "demo"], "unknown key"),
    (["pretrain", "{tmp}/missing.yaml"], "no config"),
    (["submit", "dmeo", "--dry-run"], "did you mean 'demo'"),
    (["submit", "demo", "--dry-run", "--cluster", "h10"], "no cluster 'h10' (did you mean 'h100'?)"),
    (["submit", "demo", "--cluster", "{tmp}/missing.yaml"], "give a YAML file or one of: container, h100, loopback"),
    (["submit", "demo", "--dry-run", "--cluster", "{tmp}/typo.yaml"], "unknown key 'slurm.trian'"),
    (["status", "{tmp}"], "is no run folder"),
    (["cancel", "{tmp}/missing.yaml"], "there is no such file"),
    (["run", "~nobody-of-this-name/x.yaml"], "write ~/ for your home"),
    (["run", "x" * 5000], "File name too long"),
]

CONFIG_VALUES = [
    ([*RUN, "schedul=[5]"], "did you mean 'schedule'"),
    ([*RUN, "schedule=[1,"], "cannot be read"),
    ([*RUN, "name=${foo}"], "foo"),
    ([*RUN, "name=${name}"], "Recursive interpolation"),
    ([*RUN, "data.mix=[1]"], "'data.mix=[1]'"),
    ([*RUN, "seed=-1"], "seed=-1 must be at least 0"),
    ([*RUN, "seed=99999999999"], "must be at most 4294967295"),
    ([*RUN, "schedule=5"], "expected a list, such as [5]"),
    ([*RUN, "schedule=[a]"], "expected a whole number"),
    ([*RUN, "schedule=[[5]]"], "schedule[0]"),
    ([*RUN, "name=[1]"], "expected text"),
    ([*RUN, "train=5"], "expected keys and values"),
    ([*RUN, "start_from={H1-6: [1]}"], "is not text"),
    ([*RUN, "start_from={H1-9: teacher}"], "no stage 'H1-9'"),
    ([*RUN, "start_from={H1-6: H1-8}"], "no such stage before it"),
    ([*RUN, "start_from={H1-6: ../../nowhere}"], "no folder with config.json"),
    ([*PLAN, "plan.utilisation=0"], "plan.utilisation=0.0 must be above 0"),
    ([*PLAN, "plan.utilisation=2"], "must be at most 1"),
    ([*PLAN, "teacher_config={head_dim: abc}"], "teacher_config is no model config"),
    ([*PLAN, "teacher_config={model_type: bert}"], "cannot be converted"),
    (["run", "demo", "--force", "train.stesp=5"], "did you mean 'steps'"),
    ([*RUN, "threads=-1"], "threads=-1 must be at least 0"),
    ([*RUN, "threads=100000"], "must be at most 1024"),
    ([*RUN, "train.learning_rate=nan"], "train.learning_rate=nan must be above 0"),
    ([*RUN, "train.learning_rate=.inf"], "must be at most"),
    ([*RUN, "train.beta2=2"], "must be in [0, 1)"),
    ([*RUN, "train.stesp=5"], "did you mean 'steps'"),
    ([*RUN, "train.steps=many"], "expected a whole number"),
    ([*RUN, "train.steps=1.5"], "expected a whole number"),
    ([*RUN, "train.steps="], "expected a whole number"),
    ([*RUN, "train.steps=0"], "must be above 0"),
    ([*RUN, "train.steps=1000000000000000000000"], "must be at most"),
    ([*RUN, "train.steps"], "expected key=value"),
    ([*RUN, "train.gradient_checkpointing=maybe"], "expected true or false"),
    ([*RUN, "schedule=[5,5]"], "must increase"),
    ([*RUN, "schedule=[7,5]"], "must increase"),
    ([*RUN, "schedule=[5,10]"], "is not below the teacher's 10 blocks"),
    ([*RUN, "schedule=[0]"], "must increase from at least 1"),
    ([*RUN, "train.steps_by_stage=[1]"], "1 entries for 4 stages"),
    ([*RUN, "train.keep_steps=[9999]"], "no stage is trained for more than"),
    ([*RUN, "train.gradient_accumulation=3"], "not divisible"),
    ([*RUN, "sft.gradient_accumulation=3"], "sft.batch_size=8 is not divisible"),
    ([*RUN, "sft.alpha=1.5"], "must be in [0, 1]"),
    ([*RUN, "train.loss=reverse_lk"], "did you mean 'reverse_kl'"),
    ([*RUN, "train.freeze=[mixer]"], "unknown group of parameters 'mixer' (did you mean 'mixers'?)"),
    ([*RUN, "train.freeze=[mixers,body,embeddings,norms]"], "leaves nothing to train"),
    ([*RUN, "train.learning_rates={bdy: 1.0}"], "did you mean 'body'?"),
    ([*RUN, "train.on_bad_loss=skp"], "did you mean 'skip'?"),
    ([*RUN, "train.spike=0.5"], "train.spike=0.5 must be above 1"),
    ([*RUN, "engine.name=deepsped"], "did you mean 'deepspeed'?"),
    ([*RUN, "engine.name=ddp", "engine.config=zero3"], "engine.config=zero3 with engine.name=ddp"),
    ([*RUN, "engine.name=fsdp", "engine.config=offload"], "there is none here: set engine.config=full"),
    ([*RUN, "engine.name=fsdp"], "set kernels=reference"),
    ([*RUN, "engine.name=fsdp", "kernels=reference"], "torchrun --nproc-per-node N"),
    ([*PLAN, "plan.device_memory=0.1"], "what would fit:"),
    ([*PLAN, "slurm.gpus_per_node=3"], "rows cannot be shared by 3 processes"),
    ([*RUN, "train.loss=0.9 reverse_kl + 0.1 cross_entrpy"], "did you mean 'cross_entropy'"),
    ([*RUN, "train.loss=0.9reverse_kl"], "0.9 reverse_kl + 0.1 cross_entropy"),
    ([*RUN, "train.loss=0 jsd"], "must be a number above 0"),
    ([*RUN, "train.teacher_mode=ofline"], "did you mean 'offline'"),
    ([*RUN, "train.teacher_mode=sharded"], "engine.config=zero3"),
    ([*RUN, "train.teacher_top_k=0"], "must be above 0"),
    (["cache", "demo", "run_dir={tmp}/new"], "train.teacher_mode=offline"),
    (["pretrain", "teacher", "output={tmp}/new", "train.teacher_mode=offline"], "has no teacher"),
    ([*RUN, "mixer.name=mamba3"], "did you mean 'mamba2'"),
    ([*RUN, "mixer.name=../evil"], "unknown mixer.name"),
    ([*RUN, "mixer.blocks={1: mamba3}"], "unknown mixer.blocks.1 'mamba3' (did you mean 'mamba2'"),
    ([*RUN, "mixer.blocks={40: mamba2}"], "mixer.blocks.40: the teacher's blocks are 0 to"),
    ([*RUN, "mixer.blocks={x: mamba2}"], "mixer.blocks: x is no block; expected {8: mamba2, 9: mamba2}"),
    ([*RUN, "mixer.blocks={true: mamba2}"], "mixer.blocks: True is no block"),
    ([*RUN, "mixer.blocks.40=mamba2"], "mixer.blocks.40: the teacher's blocks are 0 to"),
    ([*RUN, "mixer.blocks=mamba2"], "mixer.blocks"),
    ([*RUN, "mixer.init=mli"], "did you mean 'mil'"),
    ([*RUN, "mixer.init=alined"], "did you mean 'aligned'"),
    ([*RUN, "score.first=gredy"], "did you mean 'greedy'"),
    ([*RUN, "score.aligned.steps=0"], "score.aligned.steps=0 must be above 0"),
    ([*RUN, "score.aligned.learning_rate=0"], "score.aligned.learning_rate=0.0 must be above 0"),
    ([*RUN, "score.aligned.at_once=-1"], "score.aligned.at_once=-1 must be at least 0"),
    ([*RUN, "score.aligned.lr=1"], "unknown key 'score.aligned.lr'"),
    ([*RUN, "score.first=aligned", "score.aligned={steps: 9, learning_rat: 1}"], "did you mean 'learning_rate'"),
    ([*RUN, "mixer.mil_layout=alined"], "did you mean 'aligned'"),
    ([*RUN, "mixer.d_state=24"], "must divide head_dim=32"),
    ([*RUN, "mixer.d_state=24", "mixer.blocks={0: mamba2}"], "must divide head_dim=32"),
    ([*RUN, "mixer.name=mamba2", "mixer.d_state=8"], "mixer.d_state=8 does nothing with mamba2"),
    ([*RUN, "mixer.name=mamba2", "mixer.mil_layout=faithful"], "mixer.mil_layout=faithful does nothing with mamba2"),
    ([*RUN, "mixer.d_state=0"], "mixer.d_state=0 must be above 0"),
    ([*RUN, "score.first=lo"], "did you mean 'loo'"),
    ([*RUN, "score.first=given"], "score.given=[] must be blocks, each once"),
    ([*RUN, "score.later=given", "score.given=[7,8,7]"], "score.given=[7, 8, 7] must be blocks, each once"),
    ([*RUN, "score.first=given", "score.given=[7,8,9,3,4,5,6,10]"], "block 10: the teacher's blocks are 0 to 9"),
    ([*RUN, "score.first=given", "score.given=[7,8,9]"], "names 3 blocks, and H1-8 replaces 8"),
    ([*RUN, "score.first=combine"], "score.combine=[] must be two or more different scores"),
    ([*RUN, "score.first=combine", "score.combine=[loo,loo]"], "must be two or more different scores"),
    ([*RUN, "score.first=combine", "score.combine=[loo,mrm]"], "did you mean 'mmr'"),
    ([*RUN, "score.combine=[loo,combine]"], "unknown score in score.combine 'combine'"),
    ([*RUN, "score.first=recall_drop", "score.recall_drop.recall=[]"], "at least one task under recall"),
    ([*RUN, "score.first=recall_drop", "score.recall_drop.rest=[embedded_choise_add]"], "mean 'embedded_choice_add'"),
    ([*PLAN, "target=fast"], "target='fast' cannot be read: give how many times as fast, and at which length"),
    ([*PLAN, "plan.device=h100", "target=99x at 16k"], "the best is H1-9/10 with"),
    ([*PLAN, "plan.device=h1000", "target=2x at 16k"], "did you mean 'h100'"),
    (
        [*PLAN, "plan.device=h100", "target=2x at 16k", "plan.records=[{tmp}/nowhere]"],
        "nowhere is no run folder",
    ),
    ([*RUN, "score.mmr.trainable=some"], "allowed: all, block, mixer"),
    ([*RUN, "score.mmr.candidates_at_once=-1"], "candidates_at_once=-1 must be at least 0"),
    ([*RUN, "score.mmr.halving=true", "score.mmr.candidates_at_once=2"], "leave it at 0, or set"),
    ([*RUN, "score.mmr={halving: true, halving_check: true}"], "says what that would have changed: set one"),
    ([*RUN, "score.compare=[mmr trainable=mixr]"], "did you mean 'mixer'"),
    ([*RUN, "score.compare=[mmr stesp=5]"], "unknown key 'mmr.stesp' (did you mean 'steps'?)"),
    ([*RUN, "score.compare=[mmr steps=0]"], "score.compare: 'mmr steps=0': score.mmr.steps=0 must be above 0"),
    ([*RUN, "score.compare=[loo questions=-3]"], "score.loo.questions=-3 must be at least 0"),
    ([*RUN, "score.compare=[loo task=embedded_choise]"], "did you mean 'embedded_choice'"),
    ([*RUN, "score.compare=['recall_drop rest=[]']"], "at least one task under recall and one under rest"),
    ([*RUN, "score.compare=[uniform steps=1]"], "uniform has no options of its own"),
    ([*RUN, "score.compare=[combine]"], "score.combine=[] must be two or more different scores"),
    ([*RUN, "score.compare=[given]"], "score.given=[] must be blocks, each once"),
    ([*RUN, "score.first=combine", "score.combine=[loo,given]"], "score.given=[] must be blocks, each once"),
    ([*RUN, "score.compare=[given]", "score.given=[3,4]"], "score.given names 2 blocks, and H1-8 replaces 8"),
    ([*RUN, "score.compare=[lo]"], "unknown score.compare 'lo' (did you mean 'loo'?)"),
    ([*RUN, "score.blocks=[3,10]"], "10 is no block or stands there twice; expected values in [0, 10)"),
    ([*RUN, "score.blocks=[3,3]"], "3 is no block or stands there twice"),
    ([*RUN, "score.blocks=[3,7,9]"], "adds 5 block(s) to teacher, and 3 of these are left"),
    ([*RUN, "score.blocks=[0,1,2,3,4,5]"], "H1-7 adds 1 block(s) to H1-6/10, and 0 of these are left"),
    ([*RUN, "dtype=float16"], "allowed: bfloat16, float32"),
    ([*RUN, "kernels=cuda"], "allowed: auto, cpu, fla, mamba_ssm, reference"),
    ([*RUN, "kernels=mamba-ssm"], "did you mean 'mamba_ssm'"),
    ([*RUN, "kernels=mamba_ssm"], "pip install mamba-ssm causal-conv1d"),
    ([*RUN, "kernels=fla", "mixer.name=mamba2"], "pip install flash-linear-attention"),
    ([*RUN, "kernels=fla", "mixer.name=mamba1"], "mixer mamba1: 'fla' has no kernel for selective scan"),
    ([*RUN, "data.sequence_length=1"], "must be at least 2"),
    ([*RUN, "data.mix.adds=1"], "did you mean 'add'"),
    ([*RUN, "data.mix.add=.inf"], "must be at most"),
    ([*RUN, "data.mask=prompt"], "allowed: all, assistant, completion"),
    ([*RUN, "measure.generative=[embedded_genertive]"], "did you mean 'embedded_generative'"),
    ([*RUN, "measure.generative=[humaneval]"], "measure.allow_code_execution=true"),
    ([*RUN, "measure.generative=[mbpp_instruct]"], "runs the Python code that the model writes"),
    ([*RUN, "measure.generative=[/etc/passwd]"], "unknown task"),
    ([*RUN, "measure.generative=[gsm8kk]"], "did you mean 'gsm8k'"),
    ([*RUN, "measure.generative=[hellaswag]"], "name it under measure.multiple_choice"),
    ([*RUN, "measure.generative=[gsm8k]", "measure.local_data={tmp}/nowhere"], "nowhere is no folder"),
    ([*RUN, "measure.generative=[gsm8k]", "measure.local_data={tmp}"], "copy the files of the hub's data set"),
    ([*RUN, "measure.generative=[gsm8k]"], "or set measure.local_data to a folder that holds openai/gsm8k"),
    ([*RUN, "score.loo.task=mmlu", "measure.local_data={tmp}"], "task 'mmlu_abstract_algebra': no folder"),
    ([*RUN, "score.loo.task=gsm8k"], "is not scored as multiple_choice"),
    ([*RUN, "measure.samples=8"], "would be the same answer each time"),
    ([*RUN, "measure.top_p=1.5"], "measure.top_p=1.5 must be in (0, 1]"),
    ([*RUN, "measure.few_shot.mmlu=5"], "measure.few_shot.mmlu: not among the tasks"),
    (["measure", "embeded"], "did you mean 'embedded'"),
    (["measure", "{tmp}/nowhere"], "no checkpoint"),
    (["measure", "{tmp}/an_empty_folder"], "is no checkpoint"),
    (["measure", "embedded", "demo"], "'demo' is a CONFIG or RUN, of which one is measured at a time"),
    (["measure", "embedded", "--stage", "1"], "--stage is of a RUN"),
    (["measure", "embedded", "measure.limt=1"], "did you mean 'limit'"),
    (["measure", "embedded", "--config", "dmeo"], "did you mean 'demo'"),
    (["measure", "embedded", "--output", "{tmp}/a_file"], "a_file cannot be read"),
    (["measure", "embedded", "--output", "{tmp}/none/out.json"], "has no folder"),
    (["measure", "demo", "--output", "{tmp}/new"], "--output goes with CHECKPOINTs"),
    (["measure", "measure.limit=1"], "name what to measure"),
    (["measure", "embedded", "measure.generative=[]", "measure.multiple_choice=[]"], "name a task to score"),
    ([*RUN, "measure.throughput.batches=[0]"], "must be above 0"),
    ([*RUN, "measure.throughput.batches=[]"], "at least one batch"),
    ([*RUN, "name=../../x"], "cannot be part of a file name"),
    ([*RUN, "name="], "expected text"),
    ([*RUN, "name=' '"], "cannot be part of a file name"),
    ([*RUN, 'name="a\\nb"'], "cannot be printed"),
    (["run", "demo", "run_dir=''"], "run_dir is empty"),
    (["submit", "demo", "--dry-run", "slurm.nodes=0"], "slurm.nodes=0 must be above 0"),
    (["submit", "demo", "--dry-run", 'slurm.partition="a\\nb"'], "cannot be printed"),
    (["submit", "demo", "--dry-run", "seed=1 \n"], "line breaks"),
    (["submit", "demo"], "--dry-run"),
    (["pretrain", "teacher", "output={tmp}/new", "train.steps=0"], "train.steps=0 must be above 0"),
    (["pretrain", "teacher", "output={tmp}/new", "train.loss=x"], "unknown train.loss"),
    (["pretrain", "teacher", "output={tmp}/new", "model={hidden_size: x}"], "model"),
    (["pretrain", "teacher", "output={tmp}/new", "model={hiden_size: 8}"], "did you mean 'hidden_size'"),
    (["pretrain", "teacher", "output={tmp}/new", "start={tmp}/nowhere"], "no model"),
    (["pretrain", "teacher", "output={tmp}/new", "model.model_type=qwen4"], "did you mean 'qwen3'"),
    (["pretrain", "teacher", "output={tmp}/new", "model.model_type=mistral"], "sliding-window attention"),
    (["pretrain", "teacher", "output={tmp}/new", "model={model_type: qwen2, head_dim: 8}"], "of a qwen2 model"),
    (["train", "demo", "run_dir={tmp}/new", "--stage", "H1-4"], "no stage 'H1-4'"),
    (["train", "demo", "run_dir={tmp}/new", "--stage", "six"], "is no hybrid name"),
    (["train", "demo", "run_dir={tmp}/new", "--stage", "99"], "1 to 4"),
]
TEACHERS = [
    ([*TINY, "teacher={tmp}/nowhere"], "no model"),
    ([*TINY, "teacher={tmp}"], "has no config.json"),
    ([*TINY, "teacher={tmp}/a_file"], "no model"),
    ([*TINY, "teacher=nobody/nothing"], "as a hub name it cannot be had"),
    (["merge", "{tmp}/odd_placement", "{tiny}/teacher", "--output", "{tmp}/new"], "mixers has another type"),
    (["traces", "--teacher", "{tmp}/truncated", "--prompts", "embedded", "--output", "{tmp}/new"], "cut short"),
    (["plan", "{tiny}/tiny.yaml", "teacher=nobody/nothing"], "cannot be reached, and it is not in the cache"),
    ([*TINY, "teacher=''"], "no model"),
    ([*TINY, "teacher={tmp}/bert"], "cannot be converted"),
    ([*TINY, "teacher={tmp}/sliding"], "sliding-window"),
    ([*TINY, "teacher={tmp}/no_type"], "names no model_type"),
    ([*TINY, "teacher={tmp}/unheard_of"], "unheard_of"),
    ([*TINY, "teacher={tmp}/not_json"], "config"),
    ([*TINY, "teacher={tmp}/a_list"], "config"),
    ([*TINY, "teacher={tmp}/no_blocks"], "num_hidden_layers=0"),
    ([*TINY, "teacher={tmp}/odd_heads"], "key-value heads"),
    ([*TINY, "teacher={tmp}/words"], "hidden_size"),
    ([*TINY, "teacher={tmp}/truncated"], "cut short"),
    ([*TINY, "teacher={tmp}/flipped"], "copy or download it again"),
    ([*TINY, "teacher={tmp}/huge_header"], "copy or download it again"),
    ([*TINY, "teacher={tmp}/zero_bytes"], "copy or download it again"),
    ([*TINY, "teacher={tmp}/no_weights"], "holds no weights"),
    ([*TINY, "teacher={tmp}/pickled"], "only safetensors are loaded"),
    ([*TINY, "teacher={tmp}/pickled"], "save_pretrained"),
    ([*TINY, "teacher={tmp}/shard_missing"], "model-00002-of-00002.safetensors is missing"),
    ([*TINY, "teacher={tmp}/shard_elsewhere"], "no safetensors file of its own folder"),
    ([*TINY, "teacher={tmp}/no_map"], "has no weight_map"),
    ([*TINY, "teacher={tmp}/code"], "trust_remote_code=true"),
    ([*TINY, "teacher={tmp}/code_of_tokenizer"], "tokenizer_config.json"),
    ([*TINY, "teacher={tmp}/no_tokenizer"], "has no tokenizer"),
    ([*TINY, "teacher={tmp}/broken_tokenizer"], "cannot load the tokenizer"),
    ([*TINY, "teacher={tmp}/few_embeddings"], "tokenizer of another model"),
    ([*TINY, "measure.max_new_tokens=2048"], "no room for a question in the teacher's 2048 positions"),
    ([*TINY, "teacher={tmp}/no_end"], "names no end token"),
    ([*TINY, "teacher={tmp}/no_template"], "no chat template"),
    ([*TINY, "teacher={tmp}/broken_template"], "cannot render a chat"),
    ([*TINY, "teacher={tmp}/evil_template"], "cannot render a chat"),
    (["measure", "{tmp}/no_tokenizer"], "has no tokenizer"),
    (["measure", "embedded", "{tmp}/truncated"], "cut short"),
    (["measure", "{tmp}/few_embeddings"], "tokenizer of another model"),
    (["measure", "{tmp}/pickled"], "only safetensors are loaded"),
    (["merge", "{tmp}/nowhere", "{tiny}/teacher", "--output", "{tmp}/new"], "is no checkpoint"),
    (["merge", "{tmp}/truncated", "{tiny}/teacher", "--output", "{tmp}/new"], "cut short"),
    (["merge", "{tmp}/pickled", "{tiny}/teacher", "--output", "{tmp}/new"], "only safetensors"),
    (["merge", "{tmp}/shard_elsewhere", "{tmp}/shard_elsewhere", "--output", "{tmp}/new"], "of its own folder"),
    (["merge", "{tmp}/smaller", "{tiny}/teacher", "--output", "{tmp}/new"], "intermediate_size: 32 -> 64"),
    (["merge", "{tiny}/teacher", "{tiny}/teacher", "--output", "{tmp}/new", "--alpha", "2"], "must be in [0, 1]"),
    (["merge", "{tiny}/teacher", "{tiny}/teacher", "--output", "{tmp}/a_file"], "exists already"),
    (["merge", "{tiny}/teacher", "{tiny}/teacher", "--output", "{tmp}/a_file/new"], "cannot write"),
    (["traces", "--teacher", "{tmp}/nowhere", "--prompts", "embedded", "--output", "{tmp}/new"], "no model"),
    (["traces", "--teacher", "{tmp}/code", "--prompts", "embedded", "--output", "{tmp}/new"], "trust_remote_code"),
]
LATE_TEACHERS = [
    ([*TINY, "teacher={tmp}/smaller"], "[48, 64] in the file, [48, 32] wanted"),
    ([*TINY, "teacher={tmp}/deeper"], "is missing"),
    ([*TINY, "teacher={tmp}/nan"], "hold NaN or infinite values, such as in model.norm.weight"),
    ([*TINY, "teacher={tmp}/infinite"], "hold NaN or infinite values"),
]
MMR = ["score", "{tiny}/tiny.yaml", "run_dir={tmp}/new", "score.first=mmr"]
DATA = [
    ([*RUN, "data.source={tmp}/none.jsonl"], "no such file"),
    ([*RUN, "data.mixture=[{source:embedded},{source:{tmp}/none.jsonl}]"], "data.mixture[1].source: no such file"),
    ([*RUN, "data.mixture=[{source:embedded,weight:-1}]"], "data.mixture[0].weight=-1.0 must be at least 0"),
    ([*RUN, "data.mixture=[{source:embedded,weight:.nan}]"], "data.mixture[0].weight=nan"),
    ([*RUN, "data.mixture=[{source:embedded,weight:0}]"], "weight above 0"),
    ([*RUN, "data.mixture=[{source:embedded,wieght:1}]"], "did you mean 'weight'"),
    ([*RUN, "data.mixture=[{weight:1}]"], "data.mixture[0].source is missing"),
    ([*RUN, "data.mixture=[embedded]"], "expected {source, split"),
    ([*RUN, "data.source={tmp}", "run_dir={tmp}/new"], "lies in the folder of data"),
    (["sft", "{tmp}/run", "sft.source=embedded", "sft.columns={foo: bar}"], "unknown column 'foo' in sft.columns"),
    (["sft", "{tmp}/run", "sft.split=test"], "sft.split is set, but not sft.source"),
    (["sft", "{tmp}/run", "sft.source={tmp}/an_empty_folder"], "distill sft: no data in the folder"),
    (["plan", "{tiny}/tiny.yaml", "data.source={tmp}/none.jsonl"], "no such file"),
    (["sft", "{tmp}/run", "sft.source={tmp}/none.jsonl"], "sft.source: no such file"),
    (["traces", "--teacher", "embedded", "--prompts", "{tmp}/none", "--output", "{tmp}/new"], "no such file"),
    (["traces", "--teacher", "embedded", "--prompts", "{tmp}/blank.jsonl", "--output", "{tmp}/new"], "no prompts"),
    (["traces", "--teacher", "embedded", "--prompts", "{tmp}/malformed.jsonl", "--output", "{tmp}/new"], ":2:"),
    (["traces", "--teacher", "embedded", "--prompts", "{tmp}/answers.jsonl", "--output", "{tmp}/new"], ":1:"),
    (["traces", "--teacher", "embedded", "--prompts", "embedded", "--output", "{tmp}"], "is a folder"),
    (["traces", "--teacher", "embedded", "--prompts", "embedded", "--samples", "0"], "--samples 0"),
    (["traces", "--teacher", "embedded", "--prompts", "embedded", "--top-p", "2"], "--top-p 2.0"),
    (["traces", "--teacher", "embedded", "--prompts", "embedded", "--dtype", "half"], "float32"),
]
LATE_DATA = [
    ([*MMR, "data.source={tmp}/blank.jsonl"], "blank.jsonl"),
    ([*MMR, "data.source={tmp}/one.jsonl"], "one.jsonl"),
    ([*MMR, "data.source={tmp}/malformed.jsonl"], "malformed.jsonl:2"),
    ([*MMR, "data.source={tmp}/columns.jsonl"], "question"),
    ([*MMR, "data.source={tmp}/no_target.jsonl"], "no_target.jsonl:2"),
    ([*MMR, "data.source={tmp}/numbers.jsonl"], "numbers.jsonl:1"),
    ([*MMR, "data.source={tmp}/binary.jsonl"], "binary.jsonl"),
    ([*MMR[:3], "score.first=aligned", "score.aligned={steps: 3, learning_rate: 2.0e9}"], "is no longer finite after"),
]
RUNS = [
    (["run", "demo", "run_dir={tmp}/a_file"], "a_file"),
    (["run", "demo", "run_dir={tmp}/a_file/x"], "cannot write to run_dir"),
    (["run", "demo", "run_dir=/proc/new"], "cannot write to run_dir"),
    (["train", "demo", "run_dir={tmp}/new"], "run 'distill swap'"),
    (["measure", "demo", "run_dir={tmp}/new"], "run 'distill train'"),
    (["sft", "demo", "run_dir={tmp}/new"], "has been distilled"),
    (["report", "{tmp}/nowhere"], "no config"),
    (["report", "demo", "run_dir={tmp}/nowhere"], "holds no records of a run"),
    (["report", "{tmp}/run", "{tmp}/run"], "is given twice: name each run once"),
    (["report", "{tmp}/run", "demo", "seed=1"], "seed=1 with 2 runs: of which?"),
    (["report", "seed=1"], "which run?"),
    (["report", "{tmp}/run", "--budget", "95"], "in (0, 1]: 95 per cent is 0.95"),
    (["report", "{tmp}/run", "--external", "{tmp}/missing.csv"], "there is no file"),
    (["report", "--external", "{tmp}/models.csv", "{tmp}/run"], "no column name (did you mean 'nam'?)"),
    (["run", "{tmp}/run", "tracking.wandb=x"], "needs the package wandb"),
    (["run", "{tmp}/run", "train.steps=3"], "steps: 2 -> 3"),
    (["run", "{tmp}/run", "seed=1"], "seed: 0 -> 1"),
    (["run", "{tmp}/run", "schedule=[2]"], "put new stages at the end"),
    (["run", "{tmp}/run", "teacher=embedded"], "made with other inputs"),
    (["score", "{tmp}/run", "--force"], "--force needs --stage"),
    (["run", "{tmp}/newer"], "written by a newer distill"),
    (["report", "{tmp}/newer"], "written by a newer distill"),
    (["run", "{tmp}/no_yaml"], "has no run.yaml"),
    (["run", "{tmp}/torn_yaml"], "is not YAML"),
    (["run", "{tmp}/torn_step"], "run the step that writes it again"),
    (["run", "{tmp}/list_step"], "a list in place of an object"),
    (["place", "{tmp}/torn_sealed"], "scores.json has 1 bytes in place of"),
    (["measure", "{tmp}/flipped_sealed"], "model.safetensors is damaged"),
    (["place", "{tmp}/odd_seal"], "step.json is broken: remove"),
    (["place", "{tmp}/run", "--stage", "²"], "is no hybrid name"),
    (["train", "{tmp}/no_swap", "--stage", "1", "--force"], "run 'distill run'"),
    (["place", "{tmp}/torn_scores"], "run the step that writes it again"),
    (["place", "{tmp}/no_order"], "no list 'order'"),
    (["place", "{tmp}/odd_order"], "scores.json is broken: block 77 is out of range"),
    (["swap", "{tmp}/odd_mixer"], "../evil"),
    (["swap", "{tmp}/few_mixers"], "1 mixers for 3 blocks"),
    (["place", "{tmp}/no_score", "--stage", "1"], "run 'distill score'"),
    (["swap", "{tmp}/no_checkpoint", "--stage", "2"], "run 'distill train'"),
    (["measure", "{tmp}/torn_weights"], "copy or download it again"),
    (["report", "{tmp}/torn_measure"], "run its step again"),
    (["report", "{tmp}/odd_measure"], "expected text"),
    (["report", "{tmp}/odd_log"], "line 1 is broken"),
    (["report", "{tmp}/file_in_the_way"], "cannot write to"),
]
USAGE = [
    ([], "which verb?"),
    (["scor", "demo"], "did you mean 'score'"),
    (["run"], "CONFIG|RUN"),
    (["run", "demo", "--foce"], "did you mean '--force'"),
    (["run", "demo", "--stage", "1"], "unknown argument '--stage'"),
    (["run", "demo", "steps"], "expected key=value"),
    (["train", "demo", "--stage"], "expected one argument"),
    (["traces", "--teacher", "embedded"], "--prompts"),
    (["traces", "--teacher", "embedded", "--prompts", "embedded", "--samples", "few"], "invalid int value: 'few'"),
    (["merge", "a"], "required: B"),
    (["report"], "required: CONFIG|RUN"),
    (["report", "demo", "--budgt", "1"], "did you mean '--budget'"),
    (["report", "demo", "--budget", "most"], "invalid float value: 'most'"),
    (["package", "{tmp}/missing", "--output", "{tmp}/new"], "no folder"),  # more in test_package.py
]
BENCH = ["bench", "{tiny}/teacher", "--output", "{tmp}/new/x.json"]
SHAPE = ["bench", "--shape", "{tiny}/tiny.yaml", "--output", "{tmp}/new/x.json"]
MEASUREMENTS = [
    (["bench", "apriel_h1_15b"], "do the run first"),
    (["bench"], "give CHECKPOINTs or RUNs to measure, or --shape CONFIG"),
    ([*BENCH, "--shape", "demo"], "and not both"),
    (["bench", "{tmp}/nowhere"], "no checkpoint"),
    (["bench", "nobody/nothing"], "as a hub name it cannot be had"),
    (["bench", "{tmp}/an_empty_folder"], "is no checkpoint"),
    (["bench", "{tiny}/teacher", "{tmp}/no_type"], "names no model_type"),
    ([*BENCH, "--backend", "vlm"], "did you mean 'vllm'"),
    ([*BENCH, "--backend", "vllm"], "not installed: pip install vllm"),
    ([*BENCH, "--device", "h100"], "needs --shape CONFIG"),
    ([*BENCH, "--batches", "0"], "--batches=0 must be whole numbers from 1 on"),
    ([*BENCH, "--batches", "1,many"], "with commas between them"),
    ([*BENCH, "--contexts", ""], "--contexts= must be"),
    ([*BENCH, "--output-tokens", "0"], "--output-tokens=0 must be at least 2"),
    ([*BENCH, "--repeats", "0"], "--repeats=0 must be at least 1"),
    ([*BENCH, "--memory-gb", "nan"], "--memory-gb=nan"),
    ([*BENCH, "--dtype", "float16"], "allowed: bfloat16, float32"),
    (["bench", "{tiny}/teacher", "--output", "{tmp}/an_empty_folder"], "is a folder"),
    (["bench", "{tiny}/teacher", "--output", "{tmp}/a_file/x.json"], "cannot make the folder"),
    ([*SHAPE, "--device", "h10"], "unknown device 'h10' (did you mean 'h100'"),
    ([*SHAPE, "--h", "1,3"], "h=3 must be in [0, 3)"),
    ([*SHAPE, "--h", "-1"], "--h"),
    ([*SHAPE, "--mixers", "mamba3"], "did you mean 'mamba2'"),
    (["bench", "--shape", "dmeo"], "did you mean 'demo'"),
    (["bench", "{tiny}/teacher", "--h", "1"], "--h is of hybrids of a shape"),
    (["bench", "{tiny}/teacher", "--mixers", "mamba2"], "--mixers is of hybrids of a shape"),
    (["export", "{tiny}/teacher", "--to", "hf-native", "--output", "{tmp}/out"], "is no hybrid of ours"),
    (["export", "{tmp}/nowhere", "--to", "hf-native", "--output", "{tmp}/out"], "no folder"),
    (["export", "{tiny}/teacher", "--to", "gguff", "--output", "{tmp}/out"], "unknown target 'gguff'"),
    (["quantize", "{tiny}/run", "--to", "Q4_KM", "--output", "{tmp}/new.gguf"], "did you mean 'Q4_K_M'"),
    (
        ["quantize", "{tiny}/run", "--to", "bf16", "--output", "{tmp}/new.gguf"],
        "'distill export --to gguf --dtype bf16'",
    ),
    (["quantize", "{tiny}/run", "--to", "Q8_0,q8_0", "--output", "{tmp}/new.gguf"], "names Q8_0 twice"),
    (["quantize", "{tiny}/run", "--to", "Q8_0", "--output", "{tmp}/new"], "must end in .gguf"),
    (["quantize", "{tiny}/run", "--to", "Q8_0", "--output", "{tmp}/new.gguf", "--only", "mpl"], "did you mean 'mlp'"),
    (["quantize", "{tiny}/run", "--to", "Q8_0", "--output", "{tmp}/new.gguf", "--tokens", "0"], "--tokens=0 must be"),
    (["quantize", "{tiny}/run", "--output", "{tmp}/new.gguf"], "--to"),
    (["export", "{tiny}/run", "--to", "gguf", "--output", "{tmp}/o.gguf"], "cannot be exported to gguf: mamba1"),
    (
        ["export", "{tiny}/run", "--to", "hf-native", "--dtype", "f16", "--output", "{tmp}/o"],
        "--dtype=f16 is of a gguf",
    ),
    (["measure", "{tmp}/nowhere.gguf"], "no file"),
    (["bench", "{tmp}/nowhere.gguf"], "no file"),
    (["measure", "embedded", "--gguf", "x.gguf"], "--gguf goes with the RUN"),
    (["measure", "{tiny}/run", "--gguf", "x.gguf"], "needs --stage"),
    (["import", "{tiny}/teacher", "--output", "{tmp}/out"], "is no granitemoehybrid folder"),
    (["status", "{tmp}/nowhere"], "nowhere"),
    (["cancel", "{tmp}/nowhere"], "nowhere"),
]
AT_ONCE = [*CONFIG_FILES, *CONFIG_VALUES, *TEACHERS, *DATA, *USAGE, *MEASUREMENTS]
LATER = [*LATE_TEACHERS, *LATE_DATA, *RUNS]
"""Found only when the step that needs it begins: what is there may then be touched, and is whole."""


def name_of(case: Any) -> str:
    return " ".join(case)[:90] if isinstance(case, list) else ""


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(command: list[str], capsys: Capture) -> str:
    """Runs a command that must be refused; returns the message, whose form is checked."""
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    known = bool(command) and command[0] in cli.VERBS
    assert error.startswith(f"distill {command[0]}: " if known else "distill: ")
    assert "Traceback" not in error
    lines = error.rstrip("\n").split("\n")
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS + 20
    return error


def test_the_table_is_as_long_as_promised() -> None:
    cases = [*AT_ONCE, *LATER]
    assert len({tuple(command) for command, _ in cases}) >= 100
    assert {command[0] for command, _ in cases if command} >= set(cli.VERBS), "every verb is in it"


@pytest.mark.parametrize(("command", "message"), AT_ONCE, ids=name_of)
def test_a_mistake_is_one_clear_message_before_anything_is_written(
    command: list[str], message: str, tmp_path: Path, build: Build, capsys: Capture
) -> None:
    command = build(command)
    before = contents(tmp_path)
    assert message in refused(command, capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("command", "message"), LATER, ids=name_of)
def test_what_is_found_later_leaves_only_whole_things(
    command: list[str], message: str, tmp_path: Path, build: Build, capsys: Capture
) -> None:
    command = build(command)
    before = contents(tmp_path)
    assert message in refused(command, capsys)
    after = contents(tmp_path)
    assert after.items() >= {path: data for path, data in before.items() if not path.endswith("run.yaml")}.items()
    for path in after.keys() - before.keys():
        assert not Path(path).name.startswith("."), "no temporary file is left"
        if after[path] is not None and path.endswith(".json"):
            json.loads(after[path] or b"")
        in_progress = ".partial" in path or path in ("new", "new/run.yaml", "new/stages")
        assert in_progress or after[path] is None, "no step is marked as done"


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error.with_traceback(None)

    return fail


@pytest.mark.parametrize(
    ("verb", "module", "name", "knob"),
    [
        ("train", train, "heldout_loss", "train.gradient_accumulation"),
        ("measure", measure, "figures", "measure.batch_size"),
        ("swap", swap, "hybridize", "dtype=bfloat16"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_knob(
    verb: str, module: Any, name: str, knob: str, error: Exception, build: Build, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Also where the verb is at work within ``distill run``; what was finished stands."""
    command = build(["run", "{tmp}/run"])
    folder = tmp_path / "run/stages/02-H1-2"
    for step in ("swap", "train", "measure"):
        (folder / step).rename(tmp_path / step)
        if step == verb:
            break
        (tmp_path / step).rename(folder / step)
    monkeypatch.setattr(module, name, fails(error))
    before = {path: data for path, data in contents(tmp_path / "run").items() if path != "run.yaml"}
    text = refused(command, capsys)
    assert f"out of memory in {verb}" in text and knob in text
    assert contents(tmp_path / "run").items() >= before.items()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), "pip install lm-eval"),
        (ModuleNotFoundError("No module named 'trl.x'", name="trl.x"), "pip install trl"),
        (ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)"), "nor from the cache"),
        (OSError(28, "No space left on device", "/data/x"), "No space left on device"),
        (PermissionError(13, "Permission denied", "/data/x"), "Permission denied: /data/x"),
    ],
)
def test_what_the_machine_lacks_is_named(
    error: Exception, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "read_config", fails(error))
    assert message in refused(["plan", "demo"], capsys)


def test_a_kernel_that_is_asked_for_and_not_there(
    build: Build, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.ops.kernels._installed", lambda package: not package)
    assert "pip install numba" in refused(build([*RUN, "kernels=cpu"]), capsys)


def test_kernels_of_a_device_that_is_not_here(build: Build, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model is to run; a login node, which only plans and submits, need not have one."""
    monkeypatch.setattr("distill.ops.kernels._installed", lambda package: True)
    message = refused(build([*RUN, "kernels=mamba_ssm"]), capsys)
    assert "kernels=mamba_ssm runs on a GPU alone, and PyTorch finds none" in message
    assert cli.main(["submit", "demo", "kernels=mamba_ssm", "--dry-run"]) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "kernels=cpu runs on the CPU alone" in refused(build([*RUN, "kernels=cpu"]), capsys)


def test_a_loss_that_is_not_finite_keeps_what_was_good(
    build: Build, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = build(["train", "{tmp}/no_train", "train.save_steps=1", "--stage", "1"])
    losses = iter([1.0, float("nan")])
    log = transformers.Trainer.log

    def poisoned(self: Any, logs: dict[str, float], *args: Any) -> None:
        log(self, {**logs, "loss": next(losses)} if "loss" in logs else logs, *args)

    monkeypatch.setattr(transformers.Trainer, "log", poisoned)
    text = refused(command, capsys)
    partial = tmp_path / "no_train/stages/01-H1-1/train.partial/checkpoints"
    assert "the loss became nan at step 2" in text and "rows 4 to 7" in text
    assert f"the last is {partial / 'checkpoint-1'}" in text
    assert [path.name for path in partial.iterdir()] == ["checkpoint-1"]


def test_a_bug_is_called_one(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read_config", fails(KeyError("order")))
    assert main(["plan", "demo"]) == 1
    error = capsys.readouterr().err
    assert "this is a bug of distill" in error and "KeyError: 'order' (stages/" in error
    assert "--debug" in error and "Traceback" not in error and error.count("\n") == 2


@pytest.mark.parametrize(("error", "code"), [(KeyError("order"), 1), (None, 2)])
def test_debug_shows_the_traceback(
    error: Exception | None, code: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error:
        monkeypatch.setattr(plan, "read_config", fails(error))
    assert main(["plan", "dmeo", "--debug"]) == code
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text and "stages/plan.py" in text
    assert text.splitlines()[-1 if code == 2 else -2].startswith("distill plan: "), "the message comes last"


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    build: Build, capsys: Capture, tmp_path: Path
) -> None:
    command = build(["plan", "{tiny}/tiny.yaml", "teacher={tmp}/code"])
    assert "trust_remote_code=true" in refused(command, capsys)
    assert not (tmp_path / "code/ran").exists()
    main([*command, "trust_remote_code=true"])
    assert (tmp_path / "code/ran").exists(), "consent is what makes the difference"
    (tmp_path / "code/ran").unlink()
    refused(command, capsys)
    assert not (tmp_path / "code/ran").exists(), "consent is for one command"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["plan", "dmeo"], 2, "did you mean 'demo'"),
        (["plan", "demo", "teacher=nobody/nothing"], 2, "as a hub name it cannot be had"),
        (["scor"], 2, "did you mean 'score'"),
        (["plan", "demo"], 0, ""),
    ],
)
def test_the_console_script(command: list[str], code: int, message: str, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("distill")
    here = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": here}
    done = subprocess.run([script, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not message or done.stderr.count("\n") <= LINES
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("distill")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = f"{script} submit demo --dry-run 2>{tmp_path}/err | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stdout == "#!/bin/bash\n"
    assert (tmp_path / "err").read_text() == ""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
