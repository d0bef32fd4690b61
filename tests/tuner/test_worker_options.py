"""`--workers-per-trial`, `--gpus-per-worker`: what makes no sense is said before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FINETUNE = """\
name: fine
mode: finetune
trials: 2
parameters: {backbone: squeezenet1_1, image_size: 32, lr: 0.01, batch_size: 8, epochs: 2}
"""


def _search(tuner: Any, space: Path, data: Path, *flags: str) -> Any:
    return tuner("search", space, "--data", data, "--weights", "none", "--dry-run", *flags)


def test_workers_for_probes(tuner: Any, space: Path, data: Path) -> None:
    ended = _search(tuner, space, data, "--workers-per-trial", "2")
    assert ended.code == 2
    assert "--workers-per-trial 2" in ended.err and "probes share one pass" in ended.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workers-per-trial", "0"], "a trial needs a worker"),
        (["--gpus-per-worker", "1.5"], "a fraction is less than 1"),
        (["--gpus-per-worker", "-1"], "0 GPUs or more"),
        (["--workers-per-trial", "2", "--gpus-per-worker", "0.5"], "for trials of one worker"),
    ],
)
def test_shares_that_make_no_sense(
    tuner: Any, tmp_path: Path, data: Path, flags: list[str], words: str
) -> None:
    space = tmp_path / "fine.yaml"
    space.write_text(FINETUNE)
    ended = _search(tuner, space, data, *flags)
    assert ended.code == 2 and words in ended.err
    assert "Traceback" not in ended.err
    assert _search(tuner, space, data, "--workers-per-trial", "2").code == 0
