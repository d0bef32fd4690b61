"""Which stages are trained when, and in which mode their layers are."""

from __future__ import annotations

import pytest
from torch import nn
from torchvision.ops import StochasticDepth

from core.finetuning.unfreezing import num_unfrozen, set_training


@pytest.mark.parametrize(
    ("limit", "unfreeze_epochs", "expected"),
    [
        (0, 0, [0, 0, 0, 0, 0, 0]),
        (2, 0, [2, 2, 2, 2, 2, 2]),
        (9, 0, [4, 4, 4, 4, 4, 4]),
        (None, 0, [4, 4, 4, 4, 4, 4]),
        (0, 1, [0, 0, 0, 0, 0, 0]),
        (3, 1, [1, 2, 3, 3, 3, 3]),
        (3, 2, [1, 1, 2, 2, 3, 3]),
        (None, 1, [1, 2, 3, 4, 4, 4]),
        (2, 9, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_stages_of_each_epoch(limit: int | None, unfreeze_epochs: int, expected: list[int]) -> None:
    found = [num_unfrozen(limit, unfreeze_epochs, num_stages=4, epoch=e) for e in range(1, 7)]
    assert found == expected


@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("batch_norms", [False, True])
def test_frozen_stages_are_as_they_came(drop_path: bool, batch_norms: bool) -> None:
    def stage() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), StochasticDepth(0.1, "row")
        )

    encoder = nn.Sequential(stage(), stage(), stage()).train()
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)).eval()
    norms = set_training(
        encoder, head, list(encoder)[1:], drop_path=drop_path, batch_norms=batch_norms
    )
    assert norms == ([encoder[1][1], encoder[2][1]] if batch_norms else [])
    for place, part in enumerate(encoder):
        assert all(p.requires_grad == (place > 0) for p in part.parameters())
        modes = [module.training for module in part]
        assert modes == [False, place > 0 and batch_norms, False, place > 0 and drop_path]
    assert all(m.training for m in head.modules())
