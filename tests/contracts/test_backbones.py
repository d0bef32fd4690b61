"""What every backbone promises, over the registry and one small network of each family.

Legend: N pictures, D features, h w spatial.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from onnx import TensorProto, helper
from torch import Tensor, nn
from torchvision import models

from core.backbones import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, find_backbone, list_backbones
from core.encoders import Encoder, build_encoder, load_encoder, weights_fingerprint
from core.errors import InputError
from core.networks import build_torchvision, cut_head
from core.pooling import pool

# Smaller than the networks' own size, where they allow it, to be quick.
SIZES: dict[str, int | None] = {
    "ffn": 16,
    "vgg16": 64,
    "resnet50": 64,
    "inception_v3": 96,
    "efficientnet_b0": 64,
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "googlenet": 64,
    "maxvit_t": None,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_32": 64,
    "timm/test_resnet": 64,
    "timm/test_convnext": 64,
    "timm/test_efficientnet": 64,
    "timm/test_vit": 64,
}
# `make test` proves every promise of the registry's backbones and of one other a library; of the
# other families it runs one picture, and the slow tests do the rest.
QUICK = {*BACKBONES, "mobilenet_v2", "timm/test_convnext", "timm/test_vit"}


def every(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


TRAINABLE = every(name for name in SIZES if name != "ffn")
ALL_TORCHVISION = [name for name in list_backbones() if name != "ffn"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small pictures gain nothing from threads, and lose much where cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@functools.cache
def shared_encoder(name: str) -> Encoder:
    return build_encoder(name, weights="none", input_size=SIZES[name])


def pictures_of(encoder: Encoder, num_images: int = 2) -> Tensor:
    size = encoder.backbone.input_size
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(features: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32: random networks' features may be of any size."""
    scale = expected.abs().max()
    torch.testing.assert_close(features / scale, expected / scale, rtol=1e-3, atol=1e-5)


def test_the_registry_and_every_family_of_torchvision_are_covered() -> None:
    families = {name.split("_")[0].rstrip("0123456789") for name in ALL_TORCHVISION}
    covered = {name.split("_")[0].rstrip("0123456789") for name in SIZES}
    # Wide and grouped ResNets are ResNets; `densenet121` and its like lose their digits above.
    assert families - covered == {"resnext", "wide"}
    assert set(BACKBONES) <= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_features_have_the_measured_shape_and_stages_hold_every_parameter_once(name: str) -> None:
    encoder = shared_encoder(name)
    with torch.no_grad():
        features_NDhw = encoder(pictures_of(encoder))
    assert features_NDhw.shape[:2] == (2, encoder.num_features)
    assert (features_NDhw.shape[2] * features_NDhw.shape[3] > 1) == encoder.backbone.spatial
    assert torch.isfinite(features_NDhw).all()
    assert not torch.equal(features_NDhw[0], features_NDhw[1])
    held = [id(p) for stage in encoder.stages() for p in stage.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in encoder.parameters()}
    assert len(encoder.stages()) >= 3 or not encoder.backbone.trainable


@pytest.mark.parametrize("name", every(SIZES))
def test_features_repeat_and_do_not_depend_on_the_batch(name: str) -> None:
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    with torch.no_grad():
        first, again, alone = encoder(images), encoder(images), encoder(images[1:])
    assert torch.equal(first, again)
    assert_close(alone, first[1:])


@pytest.mark.parametrize("name", every(SIZES))
def test_an_exported_encoder_loads_with_equal_features(name: str, tmp_path: Path) -> None:
    encoder = shared_encoder(name)
    spec = json.loads(json.dumps(encoder.export(tmp_path)))
    loaded = load_encoder(tmp_path, spec)
    images = pictures_of(encoder)
    with torch.no_grad():
        assert torch.equal(loaded(images), encoder(images))
    assert loaded.backbone == encoder.backbone
    assert weights_fingerprint(loaded) == weights_fingerprint(encoder)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_reach_the_unfrozen_stages_only(name: str) -> None:
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    for num_unfrozen in (1, len(encoder.stages())):
        encoder.requires_grad_(False)
        for stage in encoder.stages()[-num_unfrozen:]:
            stage.requires_grad_(True)
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        wanted = {id(p) for s in encoder.stages()[-num_unfrozen:] for p in s.parameters()}
        reached = {id(p) for p in encoder.parameters() if p.grad is not None}
        assert reached == wanted
    encoder.zero_grad()


def test_stages_are_the_resolutions_of_a_network_and_the_blocks_of_a_transformer() -> None:
    resnet, vgg, vit = (shared_encoder(n) for n in ("resnet50", "vgg16", "vit_b_32"))
    network = resnet.network
    expected = [
        [network.conv1, network.bn1],
        *([getattr(network, f"layer{i}")] for i in range(1, 5)),
    ]
    assert [list(stage) for stage in resnet.stages()] == expected  # type: ignore[call-overload]
    assert [len(stage) for stage in vgg.stages()] == [2, 2, 3, 3, 3]  # type: ignore[arg-type]
    assert len(vit.stages()) == 1 + 12


def _dense(model: nn.Module, features: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.avgpool(features).flatten(1))
    return logits


# How each family turns the features into logits: read off torchvision's own forward methods.
CLASSIFY: dict[str, Callable[..., Tensor]] = {
    "alexnet": _dense,
    "vgg16": _dense,
    "convnext_tiny": lambda m, f: m.classifier(m.avgpool(f)),
    "densenet121": lambda m, f: m.classifier(f.mean((2, 3))),
    "efficientnet_b0": lambda m, f: m.classifier(f.mean((2, 3))),
    "googlenet": lambda m, f: m.fc(f.mean((2, 3))),
    "inception_v3": lambda m, f: m.fc(f.mean((2, 3))),
    "maxvit_t": lambda m, f: m.classifier(f),
    "mnasnet0_5": lambda m, f: m.classifier(f.mean((2, 3))),
    "mobilenet_v2": lambda m, f: m.classifier(f.mean((2, 3))),
    "mobilenet_v3_small": lambda m, f: m.classifier(f.mean((2, 3))),
    "regnet_x_400mf": lambda m, f: m.fc(f.mean((2, 3))),
    "resnet50": lambda m, f: m.fc(f.mean((2, 3))),
    "shufflenet_v2_x0_5": lambda m, f: m.fc(f.mean((2, 3))),
    "squeezenet1_1": lambda m, f: m.classifier(f).flatten(1),
    "swin_t": lambda m, f: m.head(f.mean((2, 3))),
    "swin_v2_t": lambda m, f: m.head(f.mean((2, 3))),
    "vit_b_32": lambda m, f: m.heads(f),
}


@pytest.mark.parametrize("name", every(CLASSIFY))
def test_the_cut_network_and_the_head_give_the_whole_network_s_logits(name: str) -> None:
    size = SIZES[name] or find_backbone(name).input_size
    with torch.random.fork_rng(devices=[]):
        model = build_torchvision(name, size).eval()
        for parameter in model.parameters():
            if not parameter.any():  # a head of zeros would prove nothing
                nn.init.normal_(parameter, std=0.1)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = CLASSIFY[name](model, cut_head(model)(images))
        assert_close(logits, model(images))


def test_every_torchvision_classifier_has_a_record() -> None:
    assert set(ALL_TORCHVISION) == set(models.list_models(module=models))
    assert len(ALL_TORCHVISION) >= 80
    for name in ALL_TORCHVISION:
        backbone = find_backbone(name)
        preprocessing = models.get_model_weights(name).DEFAULT.transforms()
        assert backbone.input_size == preprocessing.crop_size[0] >= 224
        assert all(0 < s < 1 for s in (*backbone.mean, *backbone.std))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_TORCHVISION)
def test_every_torchvision_classifier_builds(name: str) -> None:
    encoder = build_encoder(name, weights="none")
    assert encoder.num_features >= 256
    assert encoder.backbone.spatial == find_backbone(name).spatial
    held = {id(p) for stage in encoder.stages() for p in stage.parameters()}
    assert held == {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet5O", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("inceptionv3", "inception_v3"),
        ("timm/resnet_18", "timm/resnet18"),
        ("", "valid: ffn"),
        ("timm/", "timm/NAME"),
        ("onnx/", "onnx/FILE"),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(name: str, close: str) -> None:
    with pytest.raises(InputError, match=f"unknown backbone '{name}'(.|\n)*{close}"):
        find_backbone(name)


def test_random_weights_come_from_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    prints = [
        weights_fingerprint(build_encoder("mnasnet0_5", weights="none", seed=s, input_size=32))
        for s in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert prints[0] == prints[1] != prints[2]


def test_the_encoder_normalises_and_ffn_is_the_picture() -> None:
    encoder = build_encoder("ffn")
    images = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert encoder.num_features == 3 * 48 * 48
    assert encoder.stages() == []
    torch.testing.assert_close(encoder(images)[:, :, 0, 0], ((images - mean) / std).flatten(1))


def test_inception_reads_what_torchvision_feeds_its_pretrained_network() -> None:
    """torchvision normalises for ImageNet and turns that back with `transform_input`."""
    encoder = shared_encoder("inception_v3")
    with torch.random.fork_rng(devices=[]):
        whole = models.inception_v3(weights=None, transform_input=True, init_weights=False).eval()
    whole.load_state_dict(encoder.network.state_dict(), strict=False)
    seen: list[Tensor] = []
    whole.Mixed_7c.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = pictures_of(encoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        whole((images - mean) / std)
        assert_close(encoder(images), seen[0])


def test_pooling() -> None:
    features_NDhw = torch.rand(2, 5, 3, 4)
    expected = F.adaptive_avg_pool2d(features_NDhw, 1).flatten(1)
    torch.testing.assert_close(pool(features_NDhw, "avg"), expected)
    expected = F.adaptive_max_pool2d(features_NDhw, 1).flatten(1)
    torch.testing.assert_close(pool(features_NDhw, "max"), expected)
    with pytest.raises(InputError, match="pooling: unknown pooling 'sum'"):
        pool(features_NDhw, "sum")


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_last_stages_have_maps_that_end_in_the_features(name: str) -> None:
    """As many as every family has; each with a map of its own, the last being the encoder's."""
    encoder = shared_encoder(name)
    images = pictures_of(encoder)
    with torch.no_grad():
        maps = encoder.forward_blocks(images, 3)
        assert torch.equal(maps[-1], encoder(images))
        (alone,) = encoder.forward_blocks(images, 1)
    assert torch.equal(alone, maps[-1])
    assert len(maps) == 3
    for map_NDhw in maps:
        assert map_NDhw.ndim == 4
        assert len(map_NDhw) == len(images)
        assert torch.isfinite(map_NDhw).all()
    sizes = [m.shape[2] * m.shape[3] for m in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert not torch.equal(maps[0][0], maps[0][1])


@pytest.mark.parametrize(
    ("name", "size"), [("squeezenet1_1", 16), ("vit_b_32", 100), ("timm/test_vit", 7)]
)
def test_a_size_that_a_network_cannot_read_is_refused(name: str, size: int) -> None:
    with pytest.raises(InputError, match=rf"image_size: {name} cannot read .*{size} px(.|\n)*own"):
        build_encoder(name, weights="none", input_size=size)


# --- ONNX


def write_onnx(
    path: Path,
    *,
    batch: int | str = "batch",
    size: int | str = "size",
    channels: int = 3,
    pooled: bool = False,
    kind: int = TensorProto.FLOAT,
) -> Tensor:
    """A convolution of 5 filters on a picture of any element type, and a global mean if `pooled`;
    returns the filters."""
    filters = torch.rand(5, channels, 3, 3, generator=torch.Generator().manual_seed(3))
    nodes = [
        helper.make_node("Cast", ["picture"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "filters"], ["map"]),
    ]
    output = helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, 5, None, None])
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["map"], ["vector"], axes=[2, 3], keepdims=0))
        output = helper.make_tensor_value_info("vector", TensorProto.FLOAT, [batch, 5])
    entry = helper.make_tensor_value_info("picture", kind, [batch, channels, size, size])
    values = filters.flatten().tolist()
    weights = helper.make_tensor("filters", TensorProto.FLOAT, filters.shape, values)
    graph = helper.make_graph(nodes, "tiny", [entry], [output], [weights])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return filters


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("batch", ["batch", 4])
def test_an_onnx_file_is_an_encoder(tmp_path: Path, pooled: bool, batch: int | str) -> None:
    filters = write_onnx(tmp_path / "tiny.onnx", pooled=pooled, batch=batch)
    encoder = build_encoder("onnx/tiny.onnx", weights_dir=tmp_path, input_size=8)
    images = torch.rand(6, 3, 8, 8)
    expected = F.conv2d((images - encoder.mean) / encoder.std, filters)
    if pooled:
        expected = expected.mean((2, 3), keepdim=True)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.backbone.spatial is not pooled
    assert not encoder.backbone.trainable
    assert (encoder.num_features, encoder.stages()) == (5, [])


def test_half_precision_pictures_are_fed_where_the_file_wants_them(tmp_path: Path) -> None:
    filters = write_onnx(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    encoder = build_encoder(f"onnx/{tmp_path}/half.onnx", input_size=8)
    images = torch.rand(1, 3, 8, 8)
    expected = F.conv2d(((images - encoder.mean) / encoder.std).half().float(), filters)
    torch.testing.assert_close(encoder(images), expected)


def test_an_onnx_encoder_is_exported_and_pickled_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "tiny.onnx", tmp_path / "model"
    target.mkdir()
    write_onnx(source, size=16)
    encoder = build_encoder(f"onnx/{source}")
    assert encoder.backbone.input_size == 16
    spec = json.loads(json.dumps(encoder.export(target)))
    pickled = pickle.dumps(encoder)
    source.unlink()
    images = torch.rand(2, 3, 16, 16)
    for copy in (load_encoder(target, spec), pickle.loads(pickled)):
        assert torch.equal(copy(images), encoder(images))
        assert weights_fingerprint(copy) == weights_fingerprint(encoder)


def test_onnx_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build = functools.partial(build_encoder, weights_dir=tmp_path)
    with pytest.raises(InputError, match=r"onnx/no\.onnx: no such ONNX file: tried .*no\.onnx"):
        build("onnx/no.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputError, match="onnxruntime cannot open it"):
        build("onnx/broken.onnx")
    write_onnx(tmp_path / "grey.onnx", channels=1)
    with pytest.raises(InputError, match=r"its input 'picture' is .*, not \[N, 3, S, S\]"):
        build("onnx/grey.onnx")
    write_onnx(tmp_path / "bytes.onnx", kind=TensorProto.UINT8)
    with pytest.raises(InputError, match=r"is tensor\(uint8\)(.|\n)*valid: tensor\(float\)"):
        build("onnx/bytes.onnx")
    write_onnx(tmp_path / "fixed.onnx", size=16)
    with pytest.raises(InputError, match="reads pictures of 16 px only, but got 32"):
        build("onnx/fixed.onnx", input_size=32)
    with pytest.raises(InputError, match=r"weights: .*holds its weights itself"):
        build("onnx/fixed.onnx", weights="none")
