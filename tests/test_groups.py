"""Groups of parameters: who is in which, what is left untrained, at which rates the rest is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.config import MixerConfig, TrainConfig
from distill.errors import UserError
from distill.groups import GROUPS, check_groups, describe_groups, freeze, group_of, split_by_rate
from distill.hybrid.surgery import hybridize

PLACEMENT = ["mamba1", "attention", "attention", "mamba2"]


@pytest.fixture
def hybrid(make_model: Callable[..., Any]) -> Any:
    return hybridize(make_model("qwen3", tie_word_embeddings=False), PLACEMENT, MixerConfig())


def test_every_parameter_is_in_one_group(hybrid: Any) -> None:
    names = group_of(hybrid)
    assert names.keys() == {name for name, _ in hybrid.named_parameters()}
    assert set(names.values()) == set(GROUPS)
    for name, group in names.items():
        inside = name.startswith(("model.layers.0.self_attn", "model.layers.3.self_attn"))
        assert (group == "mixers") == inside, name
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == "embeddings"
    assert names["model.norm.weight"] == names["model.layers.1.self_attn.q_norm.weight"] == "norms"
    assert names["model.layers.1.self_attn.q_proj.weight"] == names["model.layers.0.mlp.up_proj.weight"] == "body"


def test_the_table_tells_what_is_trained(hybrid: Any) -> None:
    freeze(hybrid, ["embeddings", "body"])
    train = TrainConfig(learning_rate=1e-4, learning_rates={"mixers": 1e-3}, weight_decay=0.1)
    table = {line.split()[0]: line.split()[1:] for line in describe_groups(hybrid, train)[1:]}
    assert list(table) == list(GROUPS)
    counts = {group: int(cells[0].replace(",", "")) for group, cells in table.items()}
    assert sum(counts.values()) == sum(parameter.numel() for parameter in hybrid.parameters())
    assert table["embeddings"][1:] == table["body"][1:] == ["0", "-", "-", "0"]
    assert table["norms"][1:] == [f"{counts['norms']:,}", "0.0001", "-", "0"]
    assert table["mixers"][2:4] == ["0.001", "0.1"]
    decaying = int(table["mixers"][4].replace(",", ""))
    assert 0 < decaying < counts["mixers"], "A_log, D, biases and dt's do not decay"


def test_each_group_has_its_rate_and_its_decay(hybrid: Any) -> None:
    parameters = list(hybrid.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:9], "weight_decay": 0.1}, {"params": parameters[9:], "weight_decay": 0.0}], lr=1.0
    )
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    split_by_rate(optimizer, hybrid, {"mixers": 3.0, "norms": 2.0})
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(parameters) == sum(len(group["params"]) for group in optimizer.param_groups)
    names, rates = group_of(hybrid), {"mixers": 3.0, "norms": 2.0}
    for name, parameter in hybrid.named_parameters():
        assert found[id(parameter)]["lr"] == rates.get(names[name], 1.0), name
        assert found[id(parameter)]["weight_decay"] == decay[id(parameter)], name


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"freeze": ["norm"]}, "unknown group of parameters 'norm' (did you mean 'norms'?)"),
        ({"learning_rates": {"mixer": 1.0}}, "did you mean 'mixers'?"),
        ({"learning_rates": {"body": -1.0}}, "train.learning_rates.body=-1.0 must be at least 0"),
        ({"learning_rates": {"body": 1.0}, "freeze": ["body"]}, "train.learning_rates names body, which train.freeze"),
        ({"learning_rates": {"mixers": 1.0}, "mixer_learning_rate": 2.0}, "say the same thing"),
        ({"freeze": list(GROUPS)}, "leaves nothing to train"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_groups(TrainConfig(**keys))
    assert said in str(caught.value)
