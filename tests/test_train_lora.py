"""Training of adapters that is killed again and again ends with the bits of one that was left in peace."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from test_train_resume import RUNNER, check_equal, end_state, run

ADAPTED = RUNNER.replace(
    "def child(out):",
    """
from trivet.model.lora import Size, attach, places
def adapted():
    model = Transformer(SPEC, seed=1)
    attach(model, dict.fromkeys(places(model), Size(3, 6, False)), seed=2)
    return model
def child(out):""",
).replace("train(Transformer(SPEC, seed=1),", "train(adapted(),")


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    rng = random.Random()  # other moments every time, on purpose
    signals = [(int(signal.SIGKILL), rng.uniform(0.02, 0.6)) for _ in range(5)]
    codes, printed = run(tmp_path, [*signals, (int(signal.SIGKILL), None)], ADAPTED)
    assert codes[0] == codes[-1] == 0 and -9 in codes[1:-1], printed
    check_equal(tmp_path)
    assert not [name for name in end_state(tmp_path / "straight") if name.endswith(("embed", ".weight", "gate_up"))]


def test_forgotten_adapters_are_noticed(tmp_path: Path) -> None:
    """The twin: resume with new adapters, and the same comparison fails."""
    forgetful = ADAPTED.replace(
        "def child(out):",
        "from trivet.train.checkpoint import State\n"
        "apply = State.apply\n"
        "State.apply = lambda self, model, optimizer: apply(self, adapted(), optimizer)\n"
        "def child(out):",
    )
    codes, _ = run(tmp_path, [(int(signal.SIGKILL), None)], forgetful)
    assert codes == [0, -9, 0]
    with pytest.raises(AssertionError):
        check_equal(tmp_path)
