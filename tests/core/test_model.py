"""The saved model directory. N pictures, C classes, D features."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from core.config import TrialConfig
from core.encoding.encoders import Encoder, build_encoder
from core.encoding.features import encode
from core.encoding.inputs import HeadInputs
from core.encoding.pooling import POOLINGS, num_head_features
from core.errors import InputError
from core.heads import build_head
from core.images.pictures import decode_square, open_picture
from core.models.manifest import read_manifest
from core.models.model import load_model, save_ensemble, save_model
from core.models.served import Member
from core.probing.probe import train_probes

CLASSES = ("Action", "N/A", "Sci-Fi")
SIZE = 48


def picture(seed: int, size: tuple[int, int] = (30, 44)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def parts(encoder: Encoder, kind: str = "linear", **settings: Any) -> dict[str, Any]:
    head = build_head(
        kind, num_features=encoder.num_features, num_classes=len(CLASSES), seed=1, **settings
    )
    return {
        "encoder": encoder,
        "head": head,
        "head_spec": {"kind": kind, **settings},
        "class_names": CLASSES,
        "pooling": "avg",
        "input_size": SIZE,
    }


@pytest.fixture(scope="module")
def pixels() -> Encoder:
    return build_encoder("ffn", weights="none")


@pytest.fixture(scope="module")
def convolutions() -> Encoder:
    return build_encoder("squeezenet1_1", weights="none", input_size=SIZE, seed=3)


@pytest.fixture
def saved(tmp_path: Path, pixels: Encoder) -> Path:
    save_model(tmp_path / "model", **parts(pixels))
    return tmp_path / "model"


def _square(data: bytes) -> torch.Tensor:
    """The picture [3, SIZE, SIZE], as torchvision resizes bytes."""
    image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(data)))
    return v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC)(image)


def test_probabilities_are_those_of_plain_numpy(tmp_path: Path, pixels: Encoder) -> None:
    """The whole road once more by hand: resize, scale, normalise, standardise, head, calibrate."""
    rng = np.random.default_rng(0)
    mean_D = rng.normal(size=pixels.num_features).astype(np.float32)
    std_D = rng.uniform(0.5, 2, pixels.num_features).astype(np.float32)
    values = parts(pixels)
    save_model(
        tmp_path / "model",
        **values,
        feature_mean_D=torch.from_numpy(mean_D),
        feature_std_D=torch.from_numpy(std_D),
        calibration=(0.5, -0.25),
        thresholds=[0.3, 0.4, 0.5],
        metadata={"seed": 1},
    )
    classifier = load_model(tmp_path / "model")
    pictures = [picture(seed) for seed in range(5)]
    weight_CD = values["head"].layers[0].weight.detach().numpy().astype(np.float64)
    bias_C = values["head"].layers[0].bias.detach().numpy()
    expected = []
    for data in pictures:
        square = _square(data).permute(1, 2, 0).numpy()
        scaled = (square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        features_D = (scaled.transpose(2, 0, 1).reshape(-1) - mean_D) / std_D
        logits_C = weight_CD @ features_D + bias_C
        expected.append(1 / (1 + np.exp(-(0.5 * logits_C - 0.25))))

    np.testing.assert_allclose(classifier.predict(pictures), expected, atol=1e-5)
    assert classifier.class_names == CLASSES
    assert classifier.thresholds == (0.3, 0.4, 0.5)
    assert classifier.metadata == {"seed": 1}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_features_of_several_stages_are_served_as_they_were_trained_on(
    tmp_path: Path, convolutions: Encoder, pooling: str, blocks: int
) -> None:
    """The head is trained on features encoded for the cache; the saved model starts from files."""
    pictures = [picture(seed) for seed in range(6)]
    squares = np.stack([decode_square(open_picture(data), SIZE) for data in pictures])
    features = encode(convolutions, squares, pooling=pooling, blocks=blocks)
    targets_NC = torch.eye(len(CLASSES)).repeat(2, 1)
    rows = np.arange(6)
    config = TrialConfig(backbone="squeezenet1_1", pooling=pooling, blocks=blocks, lr=0.01)
    (outcome,) = train_probes(
        features.numpy(), targets_NC, [(rows, rows)], [config], keep_state=True
    )
    inputs = HeadInputs(features.numpy(), norm="standardize", train_rows=rows, device="cpu")
    head = build_head("linear", num_features=features.shape[1], num_classes=len(CLASSES))
    head.load_state_dict(outcome.state)
    values = parts(convolutions) | {"head": head, "pooling": pooling, "blocks": blocks}
    save_model(
        tmp_path / "model",
        **values,
        feature_mean_D=inputs.mean_D,
        feature_std_D=inputs.deviation_D,
    )
    with torch.no_grad():
        expected = torch.sigmoid(head(inputs.batch(rows)))
    served = load_model(tmp_path / "model").predict(pictures)
    np.testing.assert_allclose(served, expected.numpy(), atol=1e-4)
    assert served.std(0).min() > 0.01  # it has learnt to tell the pictures apart


def test_a_model_saved_before_there_were_blocks_still_loads(
    saved: Path, tmp_path: Path, pixels: Encoder
) -> None:
    expected = load_model(saved).predict([picture(1)])
    edit(saved, lambda manifest: manifest.pop("blocks"))
    np.testing.assert_array_equal(load_model(saved).predict([picture(1)]), expected)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_standardised_pooled_features_reach_the_head(
    tmp_path: Path, convolutions: Encoder, pooling: str
) -> None:
    num_features = convolutions.num_features
    mean_D, std_D = torch.linspace(-1, 1, num_features), torch.linspace(0.5, 2, num_features)
    values = parts(convolutions, "mlp", hidden_sizes=[7, 5], dropout=0.5) | {"pooling": pooling}
    save_model(tmp_path / "model", **values, feature_mean_D=mean_D, feature_std_D=std_D)
    with torch.no_grad():
        features = convolutions(_square(picture(1))[None] / 255)
        pooled = features.mean((2, 3)) if pooling == "avg" else features.amax((2, 3))
        expected = torch.sigmoid(values["head"].eval()((pooled - mean_D) / std_D))
    np.testing.assert_allclose(
        load_model(tmp_path / "model").predict([picture(1)]), expected.numpy(), atol=1e-6
    )


def test_a_spatial_head_reads_the_standardised_map(tmp_path: Path, convolutions: Encoder) -> None:
    """Without attention, csra is the linear head on averaged features: so says its definition."""
    num_features = convolutions.num_features
    statistics = {
        "feature_mean_D": torch.linspace(-1, 1, num_features),
        "feature_std_D": torch.linspace(0.5, 2, num_features),
    }
    save_model(tmp_path / "csra", **parts(convolutions, "csra", csra_lambda=0.0), **statistics)
    save_model(tmp_path / "linear", **parts(convolutions, "linear"), **statistics)
    pictures = [picture(1), picture(2)]
    np.testing.assert_allclose(
        load_model(tmp_path / "csra").predict(pictures),
        load_model(tmp_path / "linear").predict(pictures),
        atol=1e-6,
    )


def test_batches_and_sources_do_not_matter(saved: Path, tmp_path: Path) -> None:
    classifier = load_model(saved)
    pictures = [picture(seed) for seed in range(7)]
    files = [tmp_path / f"{seed}.png" for seed in range(7)]
    for file, data in zip(files, pictures, strict=True):
        file.write_bytes(data)
    whole_NC = classifier.predict(pictures)
    assert whole_NC.shape == (7, 3)
    assert whole_NC.dtype == np.float32
    np.testing.assert_allclose(classifier.predict(pictures, batch_size=3), whole_NC, atol=1e-6)
    np.testing.assert_array_equal(classifier.predict(files), whole_NC)


def test_no_pictures_give_no_rows(saved: Path) -> None:
    assert load_model(saved).predict([]).shape == (0, 3)


def test_a_bad_picture_is_named_by_its_row(saved: Path) -> None:
    pictures = [picture(0), picture(1), picture(2)[:60], picture(3)]
    with pytest.raises(InputError, match=r"^row 2: the picture is damaged"):
        load_model(saved).predict(pictures, batch_size=2)


def test_a_batch_size_below_one_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="batch_size >= 1 must hold"):
        load_model(saved).predict([picture(0)], batch_size=0)


def test_scores_that_are_not_finite_are_never_served(tmp_path: Path, pixels: Encoder) -> None:
    values = parts(pixels)
    with torch.no_grad():
        values["head"].layers[0].bias.fill_(float("nan"))
    save_model(tmp_path / "model", **values)
    with pytest.raises(RuntimeError, match="not a finite number"):
        load_model(tmp_path / "model").predict([picture(0)])


def test_the_directory_holds_no_pickle_and_can_be_read_by_others(
    tmp_path: Path, convolutions: Encoder
) -> None:
    save_model(tmp_path / "model", **parts(convolutions))
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == ["backbone.safetensors", "head.safetensors", "model.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, path.name


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, convolutions: Encoder) -> None:
    for name in ("first", "second"):
        save_model(tmp_path / name, **parts(convolutions))
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_an_earlier_model_is_replaced(saved: Path, pixels: Encoder) -> None:
    save_model(saved, **parts(pixels), metadata={"second": True})
    assert load_model(saved).metadata == {"second": True}


def test_other_files_are_never_overwritten(tmp_path: Path, pixels: Encoder) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        save_model(tmp_path, **parts(pixels))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_earlier_model(saved: Path, pixels: Encoder) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(saved, **parts(pixels), metadata={"bad": object()})
    assert load_model(saved).metadata == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("A", "A", "B")}, "distinct"),
        ({"class_names": ()}, "distinct"),
        ({"feature_mean_D": torch.zeros(6912)}, "go together"),
        (
            {"feature_mean_D": torch.zeros(6912), "feature_std_D": torch.zeros(6912)},
            "feature_std_D > 0 must hold",
        ),
        ({"calibration": (0.0, 1.0)}, "scale > 0 must hold"),
        ({"calibration": (1.0, float("nan"))}, "be finite"),
        ({"thresholds": [0.5]}, "one threshold a class"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, pixels: Encoder, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "model", **(parts(pixels) | change))
    assert not (tmp_path / "model").exists()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "model.json").read_text())
    change(manifest)
    (folder / "model.json").write_text(json.dumps(manifest))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), r"model\.json is missing"),
        (lambda f: (f / "model.json").write_text('{"format'), r"model\.json: is damaged"),
        (lambda f: (f / "model.json").write_text("[]"), "format_version is None"),
        (lambda f: edit(f, lambda m: m.update(format_version=99)), "format_version is 99"),
        (lambda f: edit(f, lambda m: m.pop("pooling")), "pooling missing"),
        (lambda f: edit(f, lambda m: m.update(pooling="x")), "unknown pooling 'x'"),
        (lambda f: edit(f, lambda m: m.update(blocks=3)), "ffn has no stages"),
        (lambda f: edit(f, lambda m: m["head"].update(kind="x")), "unknown head 'x'"),
        (lambda f: edit(f, lambda m: m["class_names"].pop()), r"head\.safetensors: does not fit"),
        (lambda f: edit(f, lambda m: m["files"].update({"../x": "0"})), "missing from the saved"),
        (lambda f: (f / "head.safetensors").unlink(), r"head\.safetensors: is missing"),
        (lambda f: flip_last_byte(f / "head.safetensors"), r"head\.safetensors: is damaged"),
    ],
)
def test_a_damaged_model_is_refused_by_file(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    with pytest.raises(InputError, match=message):
        load_model(saved)


def test_the_manifest_names_everything_that_prediction_needs(saved: Path) -> None:
    keys = "format format_version class_names thresholds calibration pooling blocks input_size"
    assert set(read_manifest(saved)) == {*keys.split(), "encoder", "head", "metadata", "files"}


# ---- ensembles --------------------------------------------------------------------------------


def member(encoder: Encoder, seed: int, **settings: Any) -> Member:
    """With a head of its own, and features shifted and scaled at random."""
    kind = settings.pop("kind", "linear")
    reads = {"pooling": settings.pop("pooling", "avg"), "blocks": settings.pop("blocks", 1)}
    about = {key: settings.pop(key) for key in ("weight", "calibration") if key in settings}
    num_features = num_head_features(encoder, spatial=kind == "csra", **reads)
    generator = torch.Generator().manual_seed(seed)
    return Member(
        encoder=encoder,
        head=build_head(
            kind, num_features=num_features, num_classes=len(CLASSES), seed=seed, **settings
        ).eval(),
        head_spec={"kind": kind, **settings},
        feature_mean_D=torch.randn(num_features, generator=generator),
        feature_std_D=torch.rand(num_features, generator=generator) + 0.5,
        **reads,
        **about,
    )


@pytest.fixture(scope="module")
def members(convolutions: Encoder, pixels: Encoder) -> list[Member]:
    """Three on one backbone that read it differently, one on pixels, one at another size."""
    larger = build_encoder("squeezenet1_1", weights="none", input_size=64, seed=3)
    return [
        member(convolutions, 1, weight=0.2, calibration=(0.7, -0.1)),
        member(convolutions, 2, weight=0.1, pooling="avg_max", blocks=2, calibration=(1.5, 0.2)),
        member(convolutions, 3, weight=0.3, kind="csra", csra_lambda=0.4),
        member(pixels, 4, weight=0.15, kind="mlp", hidden_sizes=[5], calibration=(2.0, 0.0)),
        member(larger, 5, weight=0.25),
    ]


@pytest.fixture
def ensemble(tmp_path: Path, members: list[Member]) -> Path:
    save_ensemble(
        tmp_path / "ensemble",
        members=members,
        class_names=CLASSES,
        calibration=(1.2, 0.1),
        thresholds=[0.3, 0.4, 0.5],
        metadata={"kind": "together"},
    )
    return tmp_path / "ensemble"


def test_an_ensemble_is_the_weighted_mean_of_its_members(
    tmp_path: Path, ensemble: Path, members: list[Member]
) -> None:
    """Each member saved as a model by itself, and the rest in numpy."""
    pictures = [picture(seed) for seed in range(5)]
    mean = np.zeros((5, len(CLASSES)))
    for number, one in enumerate(members):
        save_model(
            tmp_path / str(number),
            encoder=one.encoder,
            head=one.head,
            head_spec=one.head_spec,
            class_names=CLASSES,
            pooling=one.pooling,
            blocks=one.blocks,
            feature_mean_D=one.feature_mean_D,
            feature_std_D=one.feature_std_D,
            calibration=one.calibration,
            input_size=one.encoder.backbone.input_size,
        )
        mean += one.weight * load_model(tmp_path / str(number)).predict(pictures)
    expected = 1 / (1 + np.exp(-(1.2 * np.log(mean / (1 - mean)) + 0.1)))

    classifier = load_model(ensemble)
    np.testing.assert_allclose(classifier.predict(pictures), expected, atol=1e-5)
    np.testing.assert_allclose(
        classifier.predict(pictures, batch_size=2), classifier.predict(pictures), atol=1e-6
    )
    assert classifier.class_names == CLASSES
    assert classifier.thresholds == (0.3, 0.4, 0.5)
    assert classifier.metadata == {"kind": "together"}
    assert classifier.input_size == 64


def test_a_shared_backbone_is_written_once_and_run_once(ensemble: Path) -> None:
    manifest = read_manifest(ensemble)
    assert [spec["encoder"] for spec in manifest["members"]] == [0, 0, 0, 1, 2]
    assert sorted(path.name for path in ensemble.iterdir()) == [
        *(f"encoder-{number}" for number in range(3)),
        *(f"member-{number}" for number in range(5)),
        "model.json",
    ]
    classifier = load_model(ensemble)
    runs: list[str] = []
    encoders = {id(m.encoder): m.encoder for m in classifier._members}
    assert len(encoders) == 3
    for encoder in encoders.values():
        encoder.network.register_forward_hook(
            lambda *_, name=encoder.backbone.name: runs.append(name)
        )
    classifier.predict([picture(1), picture(2)])
    assert sorted(runs) == ["ffn", "squeezenet1_1", "squeezenet1_1"]


def test_equal_encoders_built_apart_are_one(tmp_path: Path, convolutions: Encoder) -> None:
    again = build_encoder("squeezenet1_1", weights="none", input_size=SIZE, seed=3)
    other = build_encoder("squeezenet1_1", weights="none", input_size=SIZE, seed=4)
    trio = [member(e, 1, weight=1 / 3) for e in (convolutions, again, other)]
    save_ensemble(tmp_path / "model", members=trio, class_names=CLASSES)
    assert [m["encoder"] for m in read_manifest(tmp_path / "model")["members"]] == [0, 0, 1]


def test_a_bad_picture_is_named_by_its_row_in_an_ensemble(ensemble: Path) -> None:
    with pytest.raises(InputError, match=r"^row 1: the picture is damaged"):
        load_model(ensemble).predict([picture(0), picture(2)[:60]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip_last_byte(f / "member-1/head.safetensors"), r"member-1/head.*is damaged"),
        (lambda f: (f / "encoder-0/backbone.safetensors").unlink(), r"encoder-0.*is missing"),
        (lambda f: edit(f, lambda m: m.pop("members")), "members missing"),
        (lambda f: edit(f, lambda m: m["files"].update({"a/../../x": "0"})), "is missing"),
        (lambda f: edit(f, lambda m: m["files"].update({"/etc/passwd": "0"})), "is missing"),
    ],
)
def test_a_damaged_ensemble_is_refused_by_file(
    ensemble: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(ensemble)
    with pytest.raises(InputError, match=message):
        load_model(ensemble)


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (1.5, -0.5), (1.0, 0.0)])
def test_weights_are_shares(tmp_path: Path, pixels: Encoder, weights: tuple[float, ...]) -> None:
    few = [member(pixels, seed, weight=weight) for seed, weight in enumerate(weights)]
    with pytest.raises(ValueError, match="sum to 1"):
        save_ensemble(tmp_path / "model", members=few, class_names=CLASSES)
    assert not (tmp_path / "model").exists()


def test_an_ensemble_takes_the_place_of_a_single_model(
    saved: Path, members: list[Member], pixels: Encoder
) -> None:
    save_ensemble(saved, members=members, class_names=CLASSES)
    assert not (saved / "head.safetensors").exists()
    save_model(saved, **parts(pixels))
    assert sorted(path.name for path in saved.iterdir()) == ["head.safetensors", "model.json"]
