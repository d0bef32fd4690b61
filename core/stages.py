"""Finds the stages of any network by watching one picture pass through it.

A stage is what the literature calls so: the layers between two changes of resolution. A network
without maps of at least three resolutions (a vision transformer) has one stage a block. The
resolutions are seen, not looked up: no table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

_FEWEST_UNITS = 4
_FEWEST_RESOLUTIONS = 3


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
