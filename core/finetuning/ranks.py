"""The processes that train one model together, and what they say to each other.

Training is written for any number of ranks and runs on one without torch.distributed. Every rank
trains on its part of each batch; sums, joined rows and rank 0's decisions are how they stay alike.
All of these calls are collective: every rank makes them in the same order, or all of them wait.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Ranks(Protocol):
    """One process among `count` that train together; `rank` is its number, from 0."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on all of them; shape, type and device as handed in."""
        ...

    def concat(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks in rank order, on all of them. Ranks may have unlike numbers of
        rows, none among them; the other dimensions and the type must be alike."""
        ...

    def agree(self, value: bool) -> bool:
        """Rank 0's value, on all of them."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call while training: its backward pass averages gradients over ranks.

        Only parameters that require a gradient now take part, so it is wrapped anew when others
        do. All of them must be used in every forward pass."""
        ...


class _Alone:
    """The only process: everything is said already."""

    rank = 0
    count = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def concat(self, tensor: Tensor) -> Tensor:
        return tensor

    def agree(self, value: bool) -> bool:
        return value

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


ALONE: Ranks = _Alone()


class _Joined:
    """The processes of torch.distributed's default group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        on_gpu = dist.get_backend() == "nccl"
        # NCCL moves memory of GPUs alone; what is said from the CPU goes through there.
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    def sum(self, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        total = self._carried(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def concat(self, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        lengths = self.sum(lengths)
        longest = int(lengths.max())
        own = self._carried(tensor)
        # Collectives want equal shapes: short parts are padded, and cut again behind it.
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        rows = [part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]
        return torch.cat(rows).to(tensor.device)

    def agree(self, value: bool) -> bool:
        word = torch.tensor(int(value) if self.rank == 0 else 0)
        return bool(self.sum(word))

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        devices = {p.device for p in model.parameters()}
        on_gpu = all(device.type == "cuda" for device in devices)
        settings: dict[str, Any] = {"device_ids": list(devices)} if on_gpu else {}
        # Batch norms that train do so on their own rank's pictures, and rank 0's statistics
        # replace the others' before each forward pass. Frozen ones have nothing to send.
        moving = any(_has_moving_statistics(module) for module in model.modules())
        return DistributedDataParallel(
            model, forward_sync_buffers=moving, gradient_as_bucket_view=True, **settings
        )

    def _carried(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous() if self._device is None else tensor.to(self._device)


def joined_ranks() -> Ranks:
    """The ranks of an initialised torch.distributed (Ray Train's, a test's); ALONE if there is one
    process only. With NCCL, the process' GPU must be the current one."""
    import torch.distributed as dist

    return ALONE if dist.get_world_size() == 1 else _Joined()


def _has_moving_statistics(module: nn.Module) -> bool:
    return module.training and getattr(module, "running_mean", None) is not None
