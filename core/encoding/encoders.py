"""The encoder: pictures in, feature maps out, whatever library the backbone comes from.

It takes pictures in 0..1 and normalises them itself, so that no caller can normalise twice or for
the wrong network. Stages are found by running one picture: layers whose output has the same
resolution form a stage, as the literature counts them; a network of constant resolution (a vision
transformer) has one stage a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .backbones import Backbone, find_backbone
from .networks import TimmNetwork, build_torchvision, cut_head
from .onnx_network import OnnxNetwork, find_onnx
from .stages import as_map, find_stages, has_channels_last, hook_stages, noting_maps
from .weights import load_pretrained, load_safetensors, save_safetensors

WEIGHTS_FILE = "backbone.safetensors"
ONNX_FILE = "backbone.onnx"


class Encoder(nn.Module):
    """A backbone with its weights. Legend: N pictures, D features, h w spatial.

    Built by `build_encoder` and `load_encoder`, in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        """Runs one grey picture to measure the features and the stages.

        Raises:
            InputError: the network cannot read pictures of `backbone.input_size`.
        """
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        self.eval()
        size = backbone.input_size
        with _blaming_size(backbone), torch.no_grad():
            features, self._stage_names = find_stages(
                network, lambda: self(torch.full((1, 3, size, size), 0.5))
            )
        hook_stages(network, self._stage_names)
        spatial = features.shape[2] * features.shape[3] > 1
        self.backbone = dataclasses.replace(backbone, spatial=spatial)
        self.num_features = int(features.shape[1])

    def forward(self, images_N3hw: Tensor) -> Tensor:
        """Features `[N, D, h, w]` of float pictures `[N, 3, S, S]` in 0..1, not normalised.

        `[N, D, 1, 1]` for a backbone without a feature map.
        """
        features: Tensor = self.network(self._normalised(images_N3hw))
        return features[:, :, None, None] if features.ndim == 2 else features

    def _normalised(self, images_N3hw: Tensor) -> Tensor:
        """In the same memory order. In channels_last whole lines are normalised at once: three
        numbers at a time are too few for vector instructions."""
        if not images_N3hw.is_contiguous(memory_format=torch.channels_last):
            return (images_N3hw - self.mean) / self.std
        images_Nhw3 = images_N3hw.permute(0, 2, 3, 1)
        width = images_Nhw3.shape[2]
        lines = images_Nhw3.flatten(2)
        lines = (lines - self.mean.flatten().repeat(width)) / self.std.flatten().repeat(width)
        return lines.view(images_Nhw3.shape).permute(0, 3, 1, 2)

    def forward_blocks(self, images_N3hw: Tensor, blocks: int) -> list[Tensor]:
        """Feature maps `[N, D, h, w]` of the last `blocks` stages, from input to output, of square
        pictures as `forward` takes them; the last map is `forward`'s.

        Raises:
            InputError: there are fewer stages, or a stage has no map.
        """
        self.check_blocks(blocks)
        with noting_maps() as noted:
            last: Tensor = self(images_N3hw)
        wanted = range(len(self._stage_names) - blocks, len(self._stage_names) - 1)
        try:
            channels_last = has_channels_last(noted.values())
            return [*(as_map(noted[s], channels_last=channels_last) for s in wanted), last]
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(
                f"the last {blocks} stages of {self.backbone.name} do not all have a feature map",
                where="blocks",
                hint="take fewer",
            ) from error

    def check_blocks(self, blocks: int) -> None:
        """Raises InputError for an encoder with fewer stages than `blocks`; 1 is always there."""
        num_stages = len(self._stage_names)
        if blocks > max(num_stages, 1):
            counted = f"{num_stages} stages" if num_stages else "no stages that can be read"
            raise InputError(
                f"{self.backbone.name} has {counted}, so that the last {blocks} are too many",
                where="blocks",
                hint=f"blocks can be 1 to {num_stages}" if num_stages else "leave blocks at 1",
            )

    def stages(self) -> list[nn.Module]:
        """The trainable parts from input to output; together they hold every parameter.

        Unfreezing k stages is setting `requires_grad` on the parameters of the last k. Empty for a
        backbone that cannot be trained.
        """
        stages = [
            nn.ModuleList([self.network.get_submodule(name) for name in names])
            for names in self._stage_names
        ]
        if stages:
            held = {id(p) for stage in stages for p in stage.parameters()}
            # Parameters of no layer, such as class tokens and position embeddings, act at the input
            loose = [p for p in self.network.parameters() if id(p) not in held]
            if loose:
                stages[0].append(nn.ParameterList(loose))
        return list(stages)

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the weights into `folder`; returns the JSON-able spec that `load_encoder` reads."""
        file: str | None = None
        if isinstance(self.network, OnnxNetwork):
            file = ONNX_FILE
            (folder / file).write_bytes(self.network.model_bytes)
        elif self.network.state_dict():
            file = WEIGHTS_FILE
            save_safetensors(self.network.state_dict(), folder / file)
        return {"backbone": dataclasses.asdict(self.backbone), "weights": file}


def build_encoder(
    name: str,
    *,
    weights: str | Path | None = "auto",
    weights_dir: Path | None = None,
    input_size: int | None = None,
    seed: int = 0,
) -> Encoder:
    """The encoder of a backbone, in evaluation mode on the CPU.

    Args:
        name: see `core.encoding.backbones.find_backbone`.
        weights: `auto` (or None): the file of that name in `weights_dir` if it is there, else the
            library's own pretrained weights, downloaded by the library into its own cache; `none`:
            random ones drawn from `seed`; else a file, or a folder in the place of `weights_dir`.
        weights_dir: folder of NAME.pth, NAME.safetensors and ONNX files.
        input_size: side of the picture in pixels; None for the backbone's own.
        seed: seeds random weights; the global random state is left as it was.

    Raises:
        InputError: unknown name, weights that do not fit or are not at hand, or a size that the
            network cannot read.
    """
    backbone = find_backbone(name)
    if weights is None:
        weights = "auto"
    if weights not in ("auto", "none") and Path(weights).is_dir():
        weights, weights_dir = "auto", Path(weights)
    if name.startswith("onnx/"):
        if weights != "auto":
            raise InputError(
                f"{name} holds its weights itself, so weights={str(weights)!r} has no meaning",
                where="weights",
                hint="give the folder of the file, or leave ONNX backbones out of the space",
            )
        return _onnx_encoder(backbone, find_onnx(name, weights_dir).read_bytes(), input_size)
    if input_size is not None:
        backbone = dataclasses.replace(backbone, input_size=input_size)
    network = _random_network(backbone, seed)
    if weights != "none" and name != "ffn":
        load_pretrained(network, backbone, weights=weights, weights_dir=weights_dir)
    return Encoder(backbone, _without_head(network))


def load_encoder(folder: Path, spec: dict[str, Any]) -> Encoder:
    """The encoder that `Encoder.export` wrote into `folder`. Needs no download.

    Raises:
        InputError: a damaged or missing file, or weights that do not fit.
    """
    record: dict[str, Any] = dict(spec["backbone"])
    for key in ("mean", "std"):
        record[key] = tuple(record[key])  # JSON has no tuples
    backbone = Backbone(**record)
    if backbone.name.startswith("onnx/"):
        model_bytes = _read_exported(folder / spec["weights"])
        return _onnx_encoder(backbone, model_bytes, backbone.input_size)
    network = _without_head(_random_network(backbone, seed=0))
    if spec["weights"] is not None:
        load_safetensors(network, folder / spec["weights"])
    return Encoder(backbone, network)


def weights_fingerprint(encoder: Encoder) -> str:
    """SHA-256 (hex) of the weights alone: equal weights give equal features at equal settings."""
    digest = hashlib.sha256()
    if isinstance(encoder.network, OnnxNetwork):
        digest.update(encoder.network.model_bytes)
    for name, tensor in sorted(encoder.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _random_network(backbone: Backbone, seed: int) -> nn.Module:
    if backbone.name == "ffn":
        return nn.Flatten()
    with _blaming_size(backbone), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would reseed the GPUs, too.
        torch.default_generator.manual_seed(seed)
        if backbone.name.startswith("timm/"):
            return TimmNetwork(backbone.name.removeprefix("timm/"), backbone.input_size)
        return build_torchvision(backbone.name, backbone.input_size)


def _without_head(network: nn.Module) -> nn.Module:
    return network if isinstance(network, (TimmNetwork, nn.Flatten)) else cut_head(network)


def _onnx_encoder(backbone: Backbone, model_bytes: bytes, input_size: int | None) -> Encoder:
    network = OnnxNetwork(backbone.name, model_bytes)
    size = network.choose_size(input_size or backbone.input_size, asked=input_size is not None)
    return Encoder(dataclasses.replace(backbone, input_size=size), network)


def _read_exported(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error


@contextmanager
def _blaming_size(backbone: Backbone) -> Iterator[None]:
    """Networks refuse a picture size in many ways, while they are built or when they first run."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        size, own = backbone.input_size, find_backbone(backbone.name).input_size
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{backbone.name} cannot read pictures of {size} x {size} px: {reason}",
            where="image_size",
            hint=f"its own size is {own} px" if own != size else None,
        ) from error
