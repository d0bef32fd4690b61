"""Finding, reading and fitting pretrained weights, with small networks and no network."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from core.encoding import weights as weights_module
from core.encoding.encoders import Encoder, build_encoder, load_encoder, weights_fingerprint
from core.encoding.networks import build_torchvision
from core.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "shufflenet_v2_x0_5"
SIZE = 32


def state_of(name: str = NAME, seed: int = 5, size: int = SIZE) -> dict[str, Tensor]:
    """The state dict of a whole classifier, as torchvision publishes them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        state: dict[str, Tensor] = build_torchvision(name, size).state_dict()
    return state


def encode(encoder: Encoder) -> Tensor:
    size = encoder.backbone.input_size
    with torch.no_grad():
        features: Tensor = encoder(
            torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
        )
    return features


def expected_features(name: str = NAME) -> Tensor:
    """Of the network whose weights are drawn from the seed that `state_of` uses."""
    return encode(build_encoder(name, weights="none", seed=5, input_size=SIZE))


PUBLISHED = models.get_model_weights(NAME).DEFAULT.url.rsplit("/", 1)[1]


@pytest.mark.parametrize("file", [f"{NAME}.pth", f"{NAME}.pt", PUBLISHED])
def test_auto_takes_the_file_in_the_folder(tmp_path: Path, file: str) -> None:
    torch.save(state_of(), tmp_path / file)
    encoder = build_encoder(NAME, weights_dir=tmp_path, input_size=SIZE)
    assert torch.equal(encode(encoder), expected_features())


def test_a_folder_or_a_file_as_weights_and_the_wrappers(tmp_path: Path) -> None:
    save_file(state_of(), tmp_path / f"{NAME}.safetensors")
    torch.save({"state_dict": state_of(), "epoch": 3}, tmp_path / "mine.pth")
    for weights in (tmp_path, tmp_path / f"{NAME}.safetensors", tmp_path / "mine.pth"):
        encoder = build_encoder(NAME, weights=weights, input_size=SIZE)
        assert torch.equal(encode(encoder), expected_features())


def test_the_classifier_may_be_missing_or_another(tmp_path: Path) -> None:
    state = state_of()
    for key in [k for k in state if k.startswith("fc.")]:
        del state[key]
    torch.save(state, tmp_path / "without.pth")
    torch.save({**state, "fc.weight": torch.zeros(25, 7)}, tmp_path / "other.pth")
    for file in ("without.pth", "other.pth"):
        encoder = build_encoder(NAME, weights=tmp_path / file, input_size=SIZE)
        assert torch.equal(encode(encoder), expected_features())


def test_a_safetensors_file_has_no_version_and_is_taken_as_the_present_one(tmp_path: Path) -> None:
    """MNASNet refuses state dicts without the version number that only torch.save keeps."""
    save_file(state_of("mnasnet0_5"), tmp_path / "mnasnet0_5.safetensors")
    encoder = build_encoder("mnasnet0_5", weights_dir=tmp_path, input_size=SIZE)
    assert torch.equal(encode(encoder), expected_features("mnasnet0_5"))


def test_side_branches_of_googlenet_are_dropped(tmp_path: Path) -> None:
    whole = models.googlenet(weights=None, init_weights=False)
    assert any(key.startswith("aux1.") for key in whole.state_dict())
    torch.save(whole.state_dict(), tmp_path / "googlenet.pth")
    encoder = build_encoder("googlenet", weights_dir=tmp_path, input_size=64)
    assert torch.equal(encoder.network.conv1.conv.weight, whole.conv1.conv.weight)


def test_the_names_of_published_densenets_are_translated(tmp_path: Path) -> None:
    state = state_of("densenet121")
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in state.items()
    }
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet121.pth")
    encoder = build_encoder("densenet121", weights_dir=tmp_path, input_size=SIZE)
    assert torch.equal(encode(encoder), expected_features("densenet121"))


def test_position_embeddings_are_fitted_to_another_size(tmp_path: Path) -> None:
    state = state_of("vit_b_32", size=64)
    torch.save(state, tmp_path / "vit_b_32.pth")
    encoder = build_encoder("vit_b_32", weights_dir=tmp_path, input_size=96)
    embedding = encoder.network.state_dict()["encoder.pos_embedding"]
    assert embedding.shape == (1, 1 + 3 * 3, 768)
    assert torch.equal(embedding[:, 0], state["encoder.pos_embedding"][:, 0])


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_timm_weights_from_a_file(tmp_path: Path, name: str) -> None:
    import timm

    whole = timm.create_model(name, pretrained=False).eval()
    (tmp_path / "timm").mkdir()
    save_file(whole.state_dict(), tmp_path / "timm" / f"{name}.safetensors")
    encoder = build_encoder(f"timm/{name}", weights_dir=tmp_path)
    size = encoder.backbone.input_size
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        features = encoder(images)
        whole_features = whole.forward_features((images - encoder.mean) / encoder.std)
        if whole_features.ndim == 3:
            whole_features = whole.forward_head(whole_features, pre_logits=True)[:, :, None, None]
    torch.testing.assert_close(features, whole_features)


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("stage3.2.")}


def _reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "conv1.0.weight": torch.zeros(99, 3, 3, 3)}


def _with_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "stage9.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_without, r"missing stage3\.2\.branch2"),
        (_reshaped, r"size mismatch for conv1\.0\.weight.*99, 3, 3, 3"),
        (_with_more, r"unexpected stage9\.weight"),
        (lambda state: state_of("mnasnet0_5"), r"missing conv1\.0\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: object, problem: str) -> None:
    assert callable(change)
    torch.save(change(dict(state_of())), tmp_path / f"{NAME}.pth")
    with pytest.raises(InputError, match=rf"{NAME}\.pth: the weights do not fit {NAME}: {problem}"):
        build_encoder(NAME, weights_dir=tmp_path, input_size=SIZE)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.pth"

    def refused(match: str, weights: str | Path = path) -> None:
        with pytest.raises(InputError, match=match):
            build_encoder(NAME, weights=weights, input_size=SIZE)

    refused(rf"{NAME}\.pth: no such weights file")
    path.write_bytes(b"not a file of torch")
    refused(rf"{NAME}\.pth: cannot be read as weights(.|\n)*a state dict is expected")
    torch.save(state_of(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    refused("cannot be read as weights")
    torch.save(subprocess.Popen, path)  # a pickled class: refused, not run
    refused("cannot be read as weights")
    torch.save([1, 2], path)
    refused("holds something else than a state dict")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        build_encoder(NAME, weights_dir=tmp_path / "nowhere", input_size=SIZE)


def test_without_a_network_the_error_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    url = models.get_model_weights(NAME).DEFAULT.url
    places = rf"{tmp_path}/{NAME}\.pth .*{tmp_path}/hub/checkpoints/{Path(url).name}"
    with pytest.raises(InputError, match=rf"no route(.|\n)*fetch {url} .*{places}.*--weights none"):
        build_encoder(NAME, weights_dir=tmp_path)


def test_without_a_network_timm_does_not_retry_for_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(weights_module, "getproxies", dict)
    with pytest.raises(
        InputError, match=r"fetch https://huggingface.co/timm/test_vit\S+ elsewhere"
    ):
        build_encoder("timm/test_vit", weights_dir=tmp_path)


def test_a_damaged_export_is_refused(tmp_path: Path) -> None:
    encoder = build_encoder(NAME, weights="none", input_size=SIZE)
    spec = encoder.export(tmp_path)
    save_file({"conv1.0.weight": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    with pytest.raises(InputError, match=r"backbone\.safetensors: does not fit: .*Missing key"):
        load_encoder(tmp_path, spec)
    (tmp_path / "backbone.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(InputError, match=r"backbone\.safetensors: cannot be read as weights"):
        load_encoder(tmp_path, spec)


def test_the_fingerprint_is_of_the_weights_only() -> None:
    encoder = build_encoder(NAME, weights="none", input_size=SIZE)
    other_size = build_encoder(NAME, weights="none", input_size=2 * SIZE)
    fingerprint = weights_fingerprint(encoder)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert fingerprint == weights_fingerprint(other_size)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert fingerprint != weights_fingerprint(encoder)


def test_finding_the_seeds_backbones_imports_no_framework() -> None:
    code = "import sys; from core.encoding.backbones import find_backbone; "
    code += "find_backbone('resnet50'); "
    code += "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.posters
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_real_weights_tell_real_posters_apart(
    weights_dir: Path, posters_dir: Path, name: str
) -> None:
    """Trained features differ from poster to poster far more than random ones."""
    files = sorted(posters_dir.glob("Images/*.jpg"))[:8]
    assert len(files) == 8

    def spread(encoder: Encoder) -> float:
        pictures = [np.asarray(Image.open(f).convert("RGB").resize((224, 224))) for f in files]
        images_N3hw = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            features_ND = encoder(images_N3hw).mean((2, 3))
        unit_ND = torch.nn.functional.normalize(features_ND)
        return float(1 - (unit_ND @ unit_ND.T).mean())

    trained = build_encoder(name, weights_dir=weights_dir)
    assert spread(trained) > 2 * spread(build_encoder(name, weights="none"))


@pytest.mark.posters
def test_the_real_onnx_encoder(weights_dir: Path) -> None:
    encoder = build_encoder("onnx/resnet50v2_stage3.onnx", weights_dir=weights_dir)
    assert (encoder.num_features, encoder.backbone.input_size) == (1024, 224)
    assert not encoder.backbone.spatial
