"""transformers' own checks of models and of ``generate``, run against tiny hybrids of every family and mixer.

Not collected by itself: ``make test-transformers`` names this file. The checks are not in transformers' wheel.
``TRANSFORMERS_TESTS`` lists folders (separated as in PATH) with the contents of its ``tests/``, the first that has a
file giving it: the source distribution of the installed version, which holds the checks of models and none of those
of ``generate`` and its caches, then ``tests/`` of a checkout of transformers, where one is given.

``CONTROL=1`` runs the same checks on the families themselves as well: what fails there too is no fault of a hybrid.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
import unittest
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS as TEXT_MODEL

from distill.hybrid.model import FAMILIES, HybridCausalLMMixin

FOLDERS = [folder for folder in os.environ.get("TRANSFORMERS_TESTS", "").split(os.pathsep) if folder]
if not FOLDERS:
    pytest.exit("TRANSFORMERS_TESTS names no folder with transformers' tests: use `make test-transformers`", 2)

PACKAGE = sys.modules.setdefault("tests", types.ModuleType("tests"))  # the name that those tests import each other by
PACKAGE.__path__ = [*getattr(PACKAGE, "__path__", []), *FOLDERS]

ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}
"""What the checks of models import from files that the source distribution has not."""


def stand_in(name: str, content: dict[str, Any]) -> None:
    """An otherwise empty module ``tests.NAME``, where no folder has it."""
    parent, _, leaf = name.rpartition(".")
    if any(os.path.exists(os.path.join(folder, parent, f"{leaf}.py")) for folder in FOLDERS):
        return
    package = sys.modules.setdefault(f"tests.{parent}", types.ModuleType(f"tests.{parent}"))
    package.__path__ = getattr(package, "__path__", [])
    module = sys.modules[f"tests.{name}"] = types.ModuleType(f"tests.{name}")
    module.__dict__.update(content)


for _name, _content in ABSENT.items():
    stand_in(_name, _content)
common = importlib.import_module("tests.test_modeling_common")
ConfigTester = importlib.import_module("tests.test_configuration_common").ConfigTester
TrainingTesterMixin = importlib.import_module("tests.test_training_mixin").TrainingTesterMixin

PLACEMENTS = {
    "mamba1": ["mamba1", "attention"],
    "mamba2": ["attention", "mamba2"],
    "mixed": ["mamba2", "attention", "mamba1"],
}
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 3, "use_sliding_window": False},
}
SKIPS: dict[str, str] = {
    "test_recurrent_layers_mask_padding_on_continued_forward": "has rows with padding between two of their tokens, "
    "which a hybrid refuses with a clear error: a recurrent state cannot leave out a token",
    "test_inherits_generation_mixin": "looks for GenerationMixin among the direct bases; ours has it of its family",
}
SKIPS_MIXED = {"test_num_layers_is_small": "at most two blocks; two mixers beside attention take three"}
LEFT_OUT: dict[str, str] = {
    "PipelineTesterMixin": "needs tokenizers and tiny models from the hub",
    "TensorParallelTesterMixin, FSDPTesterMixin": "their launcher of processes is not in the source distribution, and "
    "they run for the model types of a list of their own",
    "tests/utils/test_cache_utils.py": "tests transformers' caches with models of its own from the hub; the checks of "
    "caches that ask something of a model class are in GenerationTesterMixin",
    "CausalLMModelTest": "puts the mixins together, as this file does, and adds heads (sequence classification) that "
    "hybrids have not",
}
"""What is not run, with the reason: single checks (``SKIPS``, and ``SKIPS_MIXED`` for the mixed placement) and whole
test classes. Checks that only ask for more than this machine has skip themselves."""


def version_of(checkout: Path) -> str:
    """The version that a checkout's sources give themselves."""
    file = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'__version__ = "(.+?)"', file.read_text()) if file.exists() else None
    return found[1] if found else "a version that its sources do not tell"


@pytest.fixture(scope="session", autouse=True)
def provenance(record_testsuite_property: Any) -> None:
    """Which checks these are, for the report."""
    generation = [Path(folder) for folder in FOLDERS if Path(folder, "generation", "test_utils.py").exists()]
    record_testsuite_property("transformers", transformers.__version__)
    record_testsuite_property("checks of models, configs and training", version_of(Path(FOLDERS[0]).parent))
    from_checkout = version_of(generation[0].parent) if generation else "not run (no checkout given)"
    record_testsuite_property("checks of generation, caches and export", from_checkout)
    shown = "; ".join(f"{name} ({', '.join(mixers)})" for name, mixers in PLACEMENTS.items())
    record_testsuite_property("placements", shown)
    for name, reason in LEFT_OUT.items():
        record_testsuite_property(f"left out: {name}", reason)


class HybridTester:
    """What the checks ask for: a tiny config of a family with a placement (None: the family's own), and inputs."""

    def __init__(self, family: str, placement: list[str] | None) -> None:
        vars(self).update(TEXT_MODEL)
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = 4, 2, 16  # heads * head_dim != hidden size
        self.num_hidden_layers = len(placement or [0, 0])
        self.family, self.placement = family, placement
        config, _ = FAMILIES[family]
        self.config_class = config if placement else config.__mro__[2]
        self.causal_lm_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class]
        self.base_model_class = modeling_auto.MODEL_MAPPING[self.config_class]

    def get_config(self) -> Any:
        """The config, of as many blocks as the placement has."""
        keys = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
        keys += ["head_dim", "hidden_act", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]
        every = {key: getattr(self, key) for key in keys} | FAMILY_KEYS.get(self.family, {})
        if self.placement is not None:
            every["mixers"] = list(self.placement)
        return self.config_class(num_hidden_layers=len(self.placement or [0, 0]), **every)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Rows of 1 to all tokens with padding behind them.

        None of them is the padding token, of which ``generate`` without a mask would make holes in a text.
        """
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=self.eos_token_id + 1)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Checks(common.ModelTesterMixin, common.GenerationTesterMixin, TrainingTesterMixin):
    """The mixins together, for one family and placement."""

    family: str
    placement: list[str] | None
    model_tester: Any = None
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        skips = {**SKIPS, **(SKIPS_MIXED if len(self.placement or []) > 2 else {})}
        if self.placement and self._testMethodName in skips:
            self.skipTest(f"ours: {skips[self._testMethodName]}")
        self.model_tester = HybridTester(self.family, self.placement)
        self.config_tester = ConfigTester(self, config_class=self.model_tester.config_class)
        self.all_model_classes = (self.model_tester.base_model_class, self.model_tester.causal_lm_class)

    def test_config(self) -> None:
        """transformers' checks of a config class."""
        self.config_tester.run_common_tests()

    def test_attention_outputs(self) -> None:
        """As many as there are attention blocks, not as there are blocks."""
        if self.placement:
            self.model_tester.num_hidden_layers = self.placement.count("attention")
        super().test_attention_outputs()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args: Any, **kwargs: Any) -> None:
        """Left out for a model with states, which "most probably" cannot take packed documents: ours can."""
        with patch.object(self.model_tester.causal_lm_class, "_is_stateful", False):
            super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)

    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[Any, dict[str, Any]]:
        """Padding before the text, as ``generate`` asks for."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        return config, {**inputs, "attention_mask": inputs["attention_mask"].flip(-1)}

    def _check_past_key_values_for_generate(self, *args: Any, **kwargs: Any) -> None:
        """Asks for the shapes of the states of every block in turn, attention's too."""
        self.blocks = iter(self.placement or ["attention", "attention"])
        super()._check_past_key_values_for_generate(*args, **kwargs)

    def _get_conv_state_shape(self, batch_size: int, config: Any) -> tuple[int, ...]:
        self.block = next(self.blocks)
        if self.block == "attention":
            return ()
        inner = config.num_attention_heads * config.head_dim
        return batch_size, 3 * inner if self.block == "mamba2" else inner, config.mixer_config["d_conv"] - 1

    def _get_recurrent_state_shape(self, batch_size: int, config: Any) -> tuple[int, ...]:
        heads, channels = config.num_attention_heads, config.head_dim
        if self.block == "mamba2":
            return batch_size, heads, channels, channels
        if self.block == "attention":
            return ()
        return batch_size, heads * channels, config.mixer_config["d_state"]


HybridCausalLMMixin.forward.__annotations__.update(get_type_hints(HybridCausalLMMixin.forward))  # read as objects
for _family, (_config, _model) in FAMILIES.items():
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model.__name__  # gives them labels
    modeling_auto.MODEL_MAPPING_NAMES[_config.model_type] = modeling_auto.MODEL_MAPPING[_config].__name__
    for _placement, _mixers in {**PLACEMENTS, **({"teacher": None} if os.environ.get("CONTROL") else {})}.items():
        _name = f"Test_{_family}_{_placement}"
        globals()[_name] = type(_name, (Checks, unittest.TestCase), {"family": _family, "placement": _mixers})
