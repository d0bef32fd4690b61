"""Finds the stages of any network by watching one picture pass through it.

A stage is what the literature calls so: the layers between two changes of resolution. A network
without maps of at least three resolutions (a vision transformer) has one stage a block. The
resolutions are seen, not looked up: no table of architectures is needed.

A stage's map is what the next stage reads: activation and pooling between the two are part of it.
Hooks that note it stay on the network and sleep unless `noting_maps` wakes them in their thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

_FEWEST_UNITS = 4
_FEWEST_RESOLUTIONS = 3

# A context variable, as one network may predict in several threads at once.
_noted: ContextVar[dict[int, Tensor] | None] = ContextVar("noted", default=None)


@dataclass(kw_only=True)
class _Watch:
    """What was seen of each module, by name, in the order of their ends."""

    network: nn.Module
    resolutions: dict[str, tuple[int, ...] | None] = field(default_factory=dict)

    def note(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        resolution = None
        if isinstance(output, Tensor) and output.ndim == 4:
            # These two change from stage to stage, whether channels come second or last.
            resolution = tuple(output.shape[-2:])
        self.resolutions.setdefault(name, resolution)

    def children(self, name: str) -> list[str]:
        """The children that hold parameters."""
        prefix = f"{name}." if name else ""
        children = self.network.get_submodule(name).named_children()
        return [prefix + child for child, module in children if _size(module)]

    def num_resolutions(self, names: list[str]) -> int:
        return len({self.resolutions.get(n) for n in names} - {None})


def find_stages(
    network: nn.Module, run: Callable[[], Tensor]
) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """What `run` returns, and the names of the modules of each stage, from input to output.

    `run` passes a picture through the network. A norm alone joins the layer before it. Parameters
    that no layer holds (class tokens, position embeddings) are left out: see `Encoder.stages`.
    """
    watch = _Watch(network=network)
    handles = [
        module.register_forward_hook(partial(watch.note, name))
        for name, module in network.named_modules()
    ]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return output, _group(watch, _units(watch))


def hook_stages(network: nn.Module, stages: Sequence[tuple[str, ...]]) -> None:
    """Have `noting_maps` hear of each stage but the last."""
    for stage, names in enumerate(stages[1:]):
        network.get_submodule(names[0]).register_forward_pre_hook(partial(_note_map, stage))


@contextmanager
def noting_maps() -> Iterator[dict[int, Tensor]]:
    """Fills with stage -> its output, whatever its shape, for networks run in this thread."""
    noted: dict[int, Tensor] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def _note_map(stage: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    noted = _noted.get()
    if noted is not None:
        noted[stage] = inputs[0]


def as_map(output: Tensor, *, channels_last: bool) -> Tensor:
    """A stage's output as a feature map [N, D, h, w].

    Tokens [N, P, D] become [N, D, P, 1], class token included. Raises ValueError for other ranks.
    """
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim == 3:
        return output.transpose(1, 2).unsqueeze(3)
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if channels_last else output
    raise ValueError(f"{tuple(output.shape)} is no feature map")


def has_channels_last(outputs: Iterable[Tensor]) -> bool:
    """Whether a network's maps are [N, h, w, D] (Swin), told by its stages' outputs for square
    pictures: one of them may have as many features as places a side, but hardly all of them."""
    shapes = [output.shape for output in outputs if output.ndim == 4]
    return any(h == w != d for _, h, w, d in shapes) and not any(
        h == w != d for _, d, h, w in shapes
    )


def _units(watch: _Watch) -> list[str]:
    """Layers, opened from the outside while they span stages; in the order of the forward pass."""
    units = watch.children("")
    while True:
        opened = [n for n in units if _spans_stages(watch, n)]
        if not opened and 0 < len(units) < _FEWEST_UNITS:
            opened = [max(units, key=lambda n: _size(watch.network.get_submodule(n)))]
        opened = [n for n in opened if watch.children(n)]
        if not opened:
            break
        units = [u for n in units for u in (watch.children(n) if n in opened else [n])]
    order = list(watch.resolutions)
    return sorted((n for n in units if n in watch.resolutions), key=order.index)


def _spans_stages(watch: _Watch, name: str) -> bool:
    if name not in watch.resolutions:  # a list of modules, never called itself
        return True
    return watch.num_resolutions(watch.children(name)) >= _FEWEST_RESOLUTIONS


def _group(watch: _Watch, units: list[str]) -> tuple[tuple[str, ...], ...]:
    norms = {n for n in units if _is_norm(watch.network.get_submodule(n))}
    layers = [n for n in units if n not in norms]
    by_resolution = (
        all(watch.resolutions[n] is not None for n in layers)
        and watch.num_resolutions(layers) >= _FEWEST_RESOLUTIONS
    )
    stages: list[list[str]] = []
    last: tuple[int, ...] | None = None
    for name in units:
        resolution = watch.resolutions[name]
        if stages and (name in norms or (by_resolution and resolution == last)):
            stages[-1].append(name)
        else:
            stages.append([name])
            last = resolution
    return tuple(tuple(names) for names in stages)


def _is_norm(module: nn.Module) -> bool:
    return all(p.ndim <= 1 for p in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
