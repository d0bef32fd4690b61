"""Which image encoders there are, as data: names, input sizes, normalisation, capabilities.

`BACKBONES` holds the five networks of the reference comparison. Every other torchvision classifier
and every timm model is described by its library's own record, so there is no table to keep in step.
Nothing here builds a network (see `core.encoding.encoders`); torchvision and timm are imported only
when a name needs them, so that a search space is validated quickly.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What is known of an encoder before it is built."""

    name: str
    """`ffn`, a torchvision model, `timm/NAME` or `onnx/FILE`."""
    input_size: int
    """Side of the square picture it reads, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each colour channel of pictures in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each colour channel after the mean is taken off."""
    resize: str = "squash"
    """How `core.images.pictures.decode_square` makes a picture square. Posters are tall: squashing
    keeps the title and the credits, which a centre crop would cut off."""
    trainable: bool = True
    """Whether layers can be fine-tuned; False without parameters (ffn) and for ONNX files."""
    spatial: bool = True
    """Whether features are a map larger than 1 x 1. For timm and ONNX a guess until it is built:
    the encoder's own record holds what was measured."""


BACKBONES: dict[str, Backbone] = {
    "ffn": Backbone(name="ffn", input_size=48, trainable=False, spatial=False),
    "vgg16": Backbone(name="vgg16", input_size=224),
    "resnet50": Backbone(name="resnet50", input_size=224),
    "inception_v3": Backbone(name="inception_v3", input_size=299, mean=HALF, std=HALF),
    "efficientnet_b0": Backbone(name="efficientnet_b0", input_size=224),
}

# torchvision's weights for these two came from TensorFlow, which scales pictures to -1..1.
TENSORFLOW_PREPROCESSED = ("googlenet", "inception_v3")


def find_backbone(name: str) -> Backbone:
    """The record of a backbone by its name.

    Of an `onnx/FILE` nothing is opened: its true input size is known once it is built.

    Raises:
        InputError: for a name that no library holds, with the closest valid ones.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith("onnx/") and name != "onnx/":
        return Backbone(name=name, input_size=224, trainable=False)
    if name.startswith("timm/"):
        return _timm_backbone(name)
    if name not in list_backbones():
        raise _unknown_backbone(name, list_backbones())
    return _torchvision_backbone(name)


def has_stages(name: str) -> bool:
    """Whether a backbone has stages that can be unfrozen or read one by one, told by its name."""
    if name in BACKBONES:
        return BACKBONES[name].trainable
    return not name.startswith("onnx/")


def list_backbones() -> list[str]:
    """`ffn` and every torchvision classifier, sorted; `timm/NAME` and `onnx/FILE` exist besides."""
    from torchvision import models

    return sorted({*BACKBONES, *models.list_models(module=models)})


def _torchvision_backbone(name: str) -> Backbone:
    from torchvision import models

    preprocessing = models.get_model_weights(name).DEFAULT.transforms()
    if name in TENSORFLOW_PREPROCESSED:
        mean, std = HALF, HALF
    else:
        mean, std = _three(preprocessing.mean), _three(preprocessing.std)
    return Backbone(
        name=name,
        input_size=int(preprocessing.crop_size[0]),
        mean=mean,
        std=std,
        spatial=not name.startswith("vit_"),
    )


def _timm_backbone(name: str) -> Backbone:
    import timm

    model = name.removeprefix("timm/")
    if not timm.is_model(model):
        raise _unknown_backbone(name, [f"timm/{m}" for m in timm.list_models()])
    config = timm.get_pretrained_cfg(model)
    if config is None:
        return Backbone(name=name, input_size=224)
    return Backbone(
        name=name,
        input_size=int(config.input_size[-1]),
        mean=_three(config.mean),
        std=_three(config.std),
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _unknown_backbone(name: str, valid: Sequence[str]) -> InputError:
    plain = name.lower().replace("-", "_")
    close = difflib.get_close_matches(plain, valid, n=4, cutoff=0.6)
    close += [v for v in valid if v.replace("_", "") == plain.replace("_", "") and v not in close]
    kinds = "valid: ffn, a torchvision classifier such as resnet50, timm/NAME or onnx/FILE"
    hint = f"did you mean {' or '.join(close)}? {kinds}" if close else kinds
    return InputError(f"unknown backbone {name!r}", where="backbone", hint=hint)
