"""The command line: help, and wrong usage (what verbs say of bad input stands in test_bad_input.py)."""

from __future__ import annotations

import pytest

from stages.cli import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"distill {verb}" in text, "a command to paste"
    kind = {
        "merge": "CHECKPOINT",
        "package": "CHECKPOINT",
        "export": "CHECKPOINT",
        "import": "FOLDER",
        "quantize": "CHECKPOINT",
        "bench": "CHECKPOINT",
    }
    assert kind.get(verb, "CONFIG") in text
    assert ("key=value" in text) == (verb not in kind)


def test_unknown_verb_and_missing_target() -> None:
    for command in (["scor", "demo"], ["run"], []):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
