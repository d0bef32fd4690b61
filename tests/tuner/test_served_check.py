"""Whether the saved model is the one that was scored: in the same precision, however much a
network makes of rounding; and no wrong model passes.

The oracle of what was scored is the extraction's own pass over all pictures, in bfloat16, and the
head as torch computes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from core.data.split import make_split
from core.data.table import Table, read_table
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import MAP, encode
from core.heads import build_head
from core.images.pictures import decode_square, open_picture
from core.models.classifier import PictureClassifier, picture_logits
from core.models.model import save_model
from core.precision import BFLOAT16, FLOAT32
from core.synth import draw_posters
from tuner.finalists.crown import Winner
from tuner.finalists.served_check import SERVED_TOLERANCE, check_served
from tuner.finalists.view import model_lines
from tuner.trials.context import Context

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32
CALIBRATION = (0.8, -0.1)
Probabilities = npt.NDArray[Any]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("drawn")
    draw_posters(folder, num_images=120, size=(48, 72))
    return read_table(folder)


def squares_of(table: Table, size: int, resize: str) -> npt.NDArray[np.uint8]:
    return np.stack([decode_square(open_picture(p), size, resize=resize) for p in table.paths])


class Saved:
    """A head trained on the features of a randomly weighted SqueezeNet at 32 px, and saved."""

    def __init__(self, table: Table, folder: Path, *, precision: str, head: str = "linear") -> None:
        self.table, self.folder = table, folder
        self.context = Context(
            study="s", table=table, split=make_split(table, groups=range(table.num_images)),
            pictures="abc", objective="top3_accuracy", seed=0, cache=folder, folder=folder,
            weights="none", weights_dir=None, rungs=(), precision=precision, num_threads=1,
        )  # fmt: skip
        self.encoder = build_encoder("squeezenet1_1", weights="none", input_size=SIZE).eval()
        squares = squares_of(table, SIZE, self.encoder.backbone.resize)
        self.spatial = head == "csra"
        features = encode(
            self.encoder, squares, pooling=MAP if self.spatial else "avg", precision=precision
        )
        if self.spatial:  # As the cache keeps maps, and heads read them: [N, D, 1, P].
            features = features.half().float().transpose(1, 2).unsqueeze(2)
        axes = (0, 2, 3) if self.spatial else (0,)
        self.mean_D, self.std_D = features.mean(axes), features.std(axes).clamp_min(1e-6)
        shape = (-1, 1, 1) if self.spatial else (-1,)
        inputs = (features - self.mean_D.view(shape)) / self.std_D.view(shape)
        self.head = build_head(
            head, num_features=len(self.mean_D), num_classes=table.num_classes, seed=0
        )
        targets_NC = torch.from_numpy(table.targets_NC).float()
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=0.01)
        for _ in range(200):
            loss = nn.functional.binary_cross_entropy_with_logits(self.head(inputs), targets_NC)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            logits_NC = self.head.eval()(inputs)[self.context.split.test]
        self.scored_NC = torch.sigmoid(logits_NC * CALIBRATION[0] + CALIBRATION[1]).numpy()

    def check(self, **other: Any) -> float:
        """Save the model, with something `other` than what was scored, and check it."""
        scored_NC = other.pop("scored_NC", self.scored_NC)
        values: dict[str, Any] = {
            "encoder": self.encoder,
            "head": self.head,
            "feature_mean_D": self.mean_D,
            "feature_std_D": self.std_D,
            "calibration": CALIBRATION,
            **other,
        }
        folder = self.folder / "model"
        save_model(
            folder,
            head_spec={"kind": "csra" if self.spatial else "linear"},
            pooling="avg",
            class_names=self.table.class_names,
            input_size=values["encoder"].backbone.input_size,
            thresholds=None,
            **values,
        )
        return check_served(self.context, folder, tuned=[False], probabilities_NC=scored_NC)


@pytest.fixture(scope="module")
def noisy(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(table, tmp_path_factory.mktemp("noisy"), precision=BFLOAT16)


def test_a_network_that_makes_much_of_rounding_is_not_taken_for_a_wrong_model(
    noisy: Saved,
) -> None:
    """Compared with the float32 of serving, as it once was, it would be."""
    assert noisy.check() > 0.1, "the case that this is about: float32 says something else"


@pytest.mark.parametrize("head", ["linear", "csra"])
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_the_right_model_passes(table: Table, tmp_path: Path, precision: str, head: str) -> None:
    rounding = Saved(table, tmp_path, precision=precision, head=head).check()
    assert precision == BFLOAT16 or rounding < 0.01


def _other_head(saved: Saved) -> dict[str, Any]:
    kind = {"num_features": len(saved.mean_D), "num_classes": saved.table.num_classes}
    return {"head": build_head("linear", seed=1, **kind)}


def _slightly_other_head(saved: Saved) -> dict[str, Any]:
    """Every bias is a little larger."""
    head = build_head(
        "linear", num_features=len(saved.mean_D), num_classes=saved.table.num_classes, seed=0
    )
    state = {name: tensor.clone() for name, tensor in saved.head.state_dict().items()}
    for name in state:
        if name.endswith("bias"):
            state[name] += 0.3
    head.load_state_dict(state)
    return {"head": head}


def _swapped_classes(saved: Saved) -> dict[str, Any]:
    return {"scored_NC": np.roll(saved.scored_NC, 1, axis=1)}


def _other_pictures(saved: Saved) -> dict[str, Any]:
    return {"scored_NC": np.roll(saved.scored_NC, 1, axis=0)}


def _other_encoder(saved: Saved) -> dict[str, Any]:
    return {"encoder": build_encoder("squeezenet1_1", weights="none", input_size=SIZE, seed=1)}


def _cropped(saved: Saved) -> dict[str, Any]:
    """Pictures are squared in another way than those that were scored."""
    encoder = saved.encoder
    resize = "crop" if encoder.backbone.resize == "squash" else "squash"
    backbone = dataclasses.replace(encoder.backbone, resize=resize)
    return {"encoder": Encoder(backbone, encoder.network)}


def _no_scaling(saved: Saved) -> dict[str, Any]:
    return {"feature_mean_D": torch.zeros_like(saved.mean_D)}


def _no_calibration(saved: Saved) -> dict[str, Any]:
    return {"calibration": (1.0, 0.0)}


WRONG = [
    _other_head, _slightly_other_head, _swapped_classes, _other_pictures, _other_encoder,
    _cropped, _no_scaling, _no_calibration,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_model_does_not_pass(noisy: Saved, wrong: Any) -> None:
    """Of the very network whose rounding is largest."""
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        noisy.check(**wrong(noisy))


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_a_fine_tuned_model_is_compared_with_its_head_in_the_same_precision(
    table: Table, tmp_path: Path, precision: str
) -> None:
    encoder = build_encoder("squeezenet1_1", weights="none", input_size=SIZE)
    head = build_head(
        "mlp", num_features=encoder.num_features, num_classes=table.num_classes, seed=0,
        hidden_sizes=(32,),
    )  # fmt: skip
    for parameter in head.parameters():
        parameter.data *= 4  # Logits far from 0.
    model = PictureClassifier(encoder, head, pooling="avg", blocks=1)
    squares = squares_of(table, SIZE, encoder.backbone.resize)
    saved = Saved(table, tmp_path, precision=precision)
    rows = saved.context.split.test
    logits_NC = picture_logits(model, squares, rows, "cpu", precision=precision)
    folder = tmp_path / "tuned"
    save_model(
        folder, encoder=encoder, head=head, pooling="avg", class_names=table.class_names,
        head_spec={"kind": "mlp", "hidden_sizes": (32,)}, feature_mean_D=model.mean_D,
        feature_std_D=model.deviation_D, input_size=SIZE, calibration=(1.0, 0.0), thresholds=None,
    )  # fmt: skip
    scored_NC = torch.sigmoid(logits_NC).numpy()
    check_served(saved.context, folder, tuned=[True], probabilities_NC=scored_NC)
    with pytest.raises(RuntimeError, match="differs"):
        scored_NC = scored_NC + 2 * SERVED_TOLERANCE
        check_served(saved.context, folder, tuned=[True], probabilities_NC=scored_NC)


def test_a_person_is_told_of_rounding_that_matters() -> None:
    first: Any = type("Finalist", (), {"values": (0.5,), "value": 0.5, "mean": 0.5})()
    values: dict[str, Any] = {
        "study": "s", "number": 0, "settings": {}, "finalists": (first,), "optimism": 0.0,
        "validation": 0.5, "evaluation": {}, "learnt_nothing": False, "folder": "f",
    }  # fmt: skip
    assert "precision" not in dict(model_lines(Winner(**values, rounding=0.01)))
    assert "by up to 0.94" in dict(model_lines(Winner(**values, rounding=0.94)))["precision"]
