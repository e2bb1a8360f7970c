"""SIGTERM and SIGINT: at once, or after what is under way; the second time without any ado."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill import interrupt
from distill.interrupt import Stopped, asked, deferred, handled


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, handled():
        os.kill(os.getpid(), number)
    assert caught.value.signum == number and str(caught.value) == number.name
    assert signal.getsignal(number) is before and not asked()


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_stops_after_what_is_under_way(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    with pytest.raises(Stopped), handled(), deferred():
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        done.append("to its end")
    assert done
    assert f"{number.name}: finishing this step and writing a checkpoint" in capfd.readouterr().err


def test_an_error_on_the_way_is_not_hidden() -> None:
    with pytest.raises(ValueError), handled(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_ends_the_process() -> None:
    code = (
        "import importlib.util as u, os, signal, sys\n"
        "spec = u.spec_from_file_location('interrupt', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "with module.handled(), module.deferred():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('not at once')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(interrupt.__file__))], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
