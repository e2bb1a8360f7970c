"""The teacher's tokenizer: read as its file says, and the same beside a hybrid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import distill  # noqa: F401  registers the hybrids' model types
from distill.data.tokenizer import build_tokenizer
from distill.teacher import load_tokenizer

TEXT = "sort 5410  from\n\n\u00e9 don't"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram", "embedded"])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_a_tokenizer_is_what_its_file_says(
    family: str, kind: str, named: str, make_tokenizer: Callable[[str], Any], tmp_path: Path
) -> None:
    """Whatever class transformers takes for the family: Qwen2's would lose the spaces of any but its own."""
    (build_tokenizer() if kind == "embedded" else make_tokenizer(kind)).save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": named}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = load_tokenizer(str(tmp_path))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.encode(TEXT) == expected

    beside = tmp_path / "hybrid"
    tokenizer.save_pretrained(beside)
    (beside / "config.json").write_text(json.dumps({"model_type": f"hybrid_{family}", "mixers": ["attention"] * 32}))
    assert AutoTokenizer.from_pretrained(beside).encode(TEXT) == expected
