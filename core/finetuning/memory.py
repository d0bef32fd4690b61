"""How much memory a training step takes, measured, so that a batch too large is known beforehand.

A pass forward and backward peaks at a line over the batch size: what is there whatever the batch
(parameters, the optimizer's slots) and what every picture adds (its input and activations). Two
measured batches give the line. The update that follows has a peak of its own, the same for every
batch. On a GPU torch's allocator tells the peaks. On a CPU nobody does, so live tensors are counted
as operations make and drop them; scratch memory inside a kernel is not seen. Sizes are in bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEASURED_BATCHES = (2, 8)
SAFETY_MARGIN = 0.2
"""Share of the available memory that is never planned for: fragmentation, kernels' scratch, code.
On a CPU four networks took 0.8 to 1.14 times what was planned (1.28 if not channels last)."""

_MEMINFO = Path("proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Peak memory of a training step, as it depends on the number of pictures in it."""

    fixed_bytes: int
    """In a pass forward and backward, whatever the batch: parameters, the optimizer's slots."""
    bytes_per_picture: int
    """Of each picture in one pass on one device."""
    update_bytes: int
    """While the optimizer works, whatever the batch: with gradients and its scratch."""

    def peak_bytes(self, num_pictures: int) -> int:
        """Of a step of so many pictures."""
        in_pass = self.fixed_bytes + num_pictures * self.bytes_per_picture
        return max(in_pass, self.update_bytes)


def measure_memory(
    run_step: Callable[[int], None],
    *,
    resident: Iterable[Tensor],
    device: torch.device | str,
    batches: tuple[int, int] = MEASURED_BATCHES,
) -> MemoryModel:
    """Run a few small training steps and see what they take.

    Args:
        run_step: one whole step (input, forward, backward, optimizer) of so many pictures. It is
            called three times, and changes the model as training would. Its optimizer is one and
            the same, new, and the model without gradients: those and slots count when made.
        resident: tensors that are there before (parameters and buffers) and stay.
        device: where the step runs; the resident tensors lie there.
        batches: two sizes, the smaller first.

    Raises:
        torch.OutOfMemoryError: not even the measured batches fit on the GPU.
    """
    small, large = batches
    assert 0 < small < large
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in resident}
    resident_bytes = sum(storage.nbytes() for storage in storages.values())
    device = torch.device(device)
    with _Allocator(device) if device.type == "cuda" else _LiveTensors() as gauge:
        # The first step makes gradients and slots, and lets the libraries choose their kernels.
        _measure_step(run_step, small, gauge)
        low, _ = _measure_step(run_step, small, gauge)
        high, update = _measure_step(run_step, large, gauge)
    per_picture = max(0, -(-(high - low) // (large - small)))
    return MemoryModel(
        fixed_bytes=resident_bytes + max(0, low - small * per_picture),
        bytes_per_picture=per_picture,
        update_bytes=resident_bytes + update,
    )


def _measure_step(run_step: Callable[[int], None], batch: int, gauge: _Gauge) -> tuple[int, int]:
    """Peak bytes of the passes before the optimizer's update, and from there to the end."""
    passes: list[int] = []

    def at_update(*_: object) -> None:
        passes.append(gauge.take_peak())

    gauge.take_peak()
    hook = register_optimizer_step_pre_hook(at_update)
    try:
        run_step(batch)
    finally:
        hook.remove()
    last = gauge.take_peak()
    return max(passes, default=last), last


def largest_batch(
    model: MemoryModel, available_bytes: int, *, margin: float = SAFETY_MARGIN
) -> int:
    """The most pictures a step whose peak leaves `margin` of the available memory free; 0 where
    not even one fits.

    `available_bytes` is what there was before the model was built (see `available_memory`).
    """
    assert 0 <= margin < 1
    left = int(available_bytes * (1 - margin))
    if left < model.update_bytes:
        return 0
    return max(0, (left - model.fixed_bytes) // max(1, model.bytes_per_picture))


def available_memory(device: torch.device | str, *, root: Path = Path("/")) -> int:
    """Bytes that this process may still take on a device.

    GPU: free by the driver, and what torch's allocator holds without using it. CPU: what the
    system can give without swapping, but no more than the limits of the control groups around
    this process (versions 1 and 2: containers, cluster jobs) leave.

    Args:
        root: where `proc` and `sys` are; other than `/` in tests.

    Raises:
        OSError: the system does not tell (no Linux).
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fields = dict(line.split(":", 1) for line in (root / _MEMINFO).read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_group_bytes(root)]))


def _group_bytes(root: Path) -> list[int]:
    """What each control group around this process leaves of its limit."""
    left = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A limit anywhere above counts. In a container the named group is the host's, and not
        # there to see: the mounted top is the container's own.
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if (group / limit).is_file():
                text = (group / limit).read_text().strip()
                if text != "max":
                    used = int((group / usage).read_text()) - _reclaimable(group)
                    left.append(int(text) - used)
            if group == top:
                break
    return left


def _reclaimable(group: Path) -> int:
    """Bytes of files that were read and may be forgotten: they count as used, but are given up
    before anything fails."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


class _Gauge(Protocol):
    def take_peak(self) -> int:
        """Most bytes held at once since the last call, beyond those held at the start."""


class _Allocator:
    """What torch's allocator holds on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = torch.cuda.memory_allocated(device)

    def __enter__(self) -> _Allocator:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take_peak(self) -> int:
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes = 0
        self._peak = 0
        self._known: dict[int, int] = {}

    def take_peak(self) -> int:
        peak, self._peak = self._peak, self._bytes
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), before)
        self._peak = max(self._peak, self._bytes)
        return result

    def _note(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in before:  # a view, or changed in place
            return
        self._known[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._bytes -= self._known.pop(key)
