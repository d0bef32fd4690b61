"""Finds, reads and checks pretrained weights.

All roads end in a state dict that is loaded into the whole network, head included, because some
torchvision networks translate older files while loading. Keys of the head are dropped first: files
with another classifier, or none, fit. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import copy
import re
import socket
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from ..errors import InputError
from .backbones import Backbone
from .networks import HEADS, SIDE_BRANCHES, TimmNetwork

SUFFIXES = (".pth", ".pt", ".safetensors")
_WRAPPERS = ("state_dict", "model")
# torchvision's published DenseNet files predate names without a dot after norm and conv.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def load_pretrained(
    network: nn.Module, backbone: Backbone, *, weights: str | Path, weights_dir: Path | None
) -> None:
    """Load weights into a network that still has its head; see
    `core.encoding.encoders.build_encoder`.

    Raises:
        InputError: no such file, a damaged file, weights that do not fit, or a failed download.
    """
    path = Path(weights) if weights != "auto" else find_weights(backbone.name, weights_dir)
    if path is not None:
        fit_state(network, read_state(path), where=str(path), name=backbone.name)
        return
    state = _download(backbone.name, weights_dir)
    fit_state(network, state, where=weights_url(backbone.name) or backbone.name, name=backbone.name)


def find_weights(name: str, weights_dir: Path | None) -> Path | None:
    """The file of a backbone in a folder: NAME.pth, .pt or .safetensors, or as it is published."""
    if weights_dir is None:
        return None
    if not weights_dir.is_dir():
        raise InputError("no such folder", where=str(weights_dir), hint="see --weights DIR")
    for file in [name + suffix for suffix in SUFFIXES]:
        if (weights_dir / file).is_file():
            return weights_dir / file
    url = weights_url(name)
    if url is not None and not name.startswith("timm/"):
        published = weights_dir / Path(urlparse(url).path).name
        return published if published.is_file() else None
    return None


def weights_url(name: str) -> str | None:
    """Where the library of a backbone publishes its default weights."""
    if name.startswith("timm/"):
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        if config is None:
            return None
        if config.hf_hub_id:
            return f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
        return str(config.url) if config.url else None
    from torchvision import models

    url: str = models.get_model_weights(name).DEFAULT.url
    return url


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a .pth, .pt or .safetensors file.

    Raises:
        InputError: missing, damaged, or holding anything but tensors.
    """
    if not path.is_file():
        raise InputError("no such weights file", where=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise bare exceptions of many kinds on damaged files
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"cannot be read as weights: {message[0]}",
            where=str(path),
            hint="a state dict is expected: torch.save(model.state_dict(), path) or safetensors",
        ) from error
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            "holds something else than a state dict of tensors",
            where=str(path),
            hint="write it with torch.save(model.state_dict(), path)",
        )
    return state


def fit_state(network: nn.Module, state: Mapping[str, Tensor], *, where: str, name: str) -> None:
    """Load a state dict into a network with its head; head and side branches may be missing.

    Raises:
        InputError: the first keys or shapes that do not fit.
    """
    module = network
    dropped: tuple[str, ...] = (*HEADS, *SIDE_BRANCHES)
    if isinstance(network, TimmNetwork):
        # Built without a classifier: what is left of its head is part of the encoder.
        module, dropped = network.model, ()
    try:
        state = _prepare(network, state, dropped)
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        details = [line.strip() for line in str(error).splitlines()]
        shapes = [line for line in details if line.startswith("size mismatch")] or details
        raise _misfit(name, where, shapes[:3]) from error
    network.train()  # some networks keep what they computed from their former weights until then
    missing = [key for key in missing if key.split(".")[0] not in dropped]
    problems = [f"missing {key}" for key in missing[:3]]
    problems += [f"unexpected {key}" for key in unexpected[:3]]
    if problems:
        raise _misfit(name, where, problems)


def _prepare(
    network: nn.Module, state: Mapping[str, Tensor], dropped: Iterable[str]
) -> Mapping[str, Tensor]:
    if isinstance(network, TimmNetwork):
        return network.translate(state)
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    # A copy that keeps the version numbers that torch hides on its state dicts.
    copied: Any = copy.copy(state) if isinstance(state, OrderedDict) else OrderedDict(state)
    if not hasattr(copied, "_metadata"):
        present: Any = network.state_dict()
        copied._metadata = present._metadata
    prepared: OrderedDict[str, Tensor] = copied
    for key in list(prepared):
        if key.split(".")[0] in dropped:
            del prepared[key]
        elif old := _OLD_DENSENET.match(key):
            prepared[old[1] + old[2]] = prepared.pop(key)
    if isinstance(network, VisionTransformer) and "encoder.pos_embedding" in prepared:
        prepared = interpolate_embeddings(network.image_size, network.patch_size, prepared)
    return prepared


def _misfit(name: str, where: str, problems: list[str]) -> InputError:
    return InputError(
        f"the weights do not fit {name}: {'; '.join(problems)}",
        where=where,
        hint=f"a state dict of {name} is needed; its classifier may be missing",
    )


def _download(name: str, weights_dir: Path | None) -> Mapping[str, Tensor]:
    try:
        return _download_timm(name) if name.startswith("timm/") else _download_torchvision(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_at_hand(name, weights_dir, error) from error


def _download_torchvision(name: str) -> Mapping[str, Tensor]:
    from torchvision import models

    weights: Any = models.get_model_weights(name).DEFAULT
    state: Mapping[str, Tensor] = weights.get_state_dict(
        progress=sys.stderr.isatty(), check_hash=True
    )
    return state


def _download_timm(name: str) -> Mapping[str, Tensor]:
    import huggingface_hub
    import timm

    model = name.removeprefix("timm/")
    config = timm.get_pretrained_cfg(model)
    if config is not None and config.hf_hub_id:
        cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
        if isinstance(cached, str):
            return read_state(Path(cached))
        if not getproxies():
            # Without a network huggingface_hub retries for 48 s; a failed look-up says it at once.
            socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    state: Mapping[str, Tensor] = timm.create_model(
        model, pretrained=True, num_classes=0
    ).state_dict()
    return state


def _not_at_hand(name: str, weights_dir: Path | None, error: Exception) -> InputError:
    url = weights_url(name)
    folder = "DIR" if weights_dir is None else str(weights_dir)
    suffix = Path(urlparse(url).path).suffix if url else ".pth"
    places = f"{folder}/{name}{suffix} (then --weights {folder})"
    if url and not name.startswith("timm/"):
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        places += f" or as {cached}"
    reason = (str(error).strip().splitlines() or [""])[0]
    return InputError(
        f"no pretrained weights at hand, and the download failed: {type(error).__name__}: {reason}",
        where=name,
        hint=f"fetch {url or 'a state dict of it'} elsewhere and put it as {places}; "
        "or take random weights with --weights none",
    )


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, path)


def load_safetensors(network: nn.Module, path: Path) -> None:
    """Load a file of `save_safetensors` into the network that it was written from.

    Raises:
        InputError: a missing or damaged file, or weights that do not fit.
    """
    try:
        network.load_state_dict(read_state(path))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise InputError(f"does not fit: {'; '.join(lines[:3])}", where=str(path)) from error
