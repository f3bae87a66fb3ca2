"""An interrupt ends a stage and names it, also when the code of the stage swallows it."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from vlm_export.exporting.stages import Stages
from vlm_export.interrupts import remembered_interrupts


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_that_a_stage_swallows(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stages = Stages()
    with remembered_interrupts():
        with pytest.raises(KeyboardInterrupt) as caught, stages.stage("export vision"), suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        assert caught.value.args == ("stage: export vision",)
    assert signal.getsignal(number) == before
    with stages.stage("the next command"):
        pass
    assert [record.name for record in stages.records] == ["the next command"]


def test_ignored_signals_stay_ignored() -> None:
    """As under `nohup` or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
