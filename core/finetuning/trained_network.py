"""A classifier as the training loop calls it: partly frozen, over ranks, perhaps compiled.

Validation calls the plain model instead, as its modes and shapes would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.classifier import PictureClassifier
from ..precision import autocast
from .ranks import Ranks
from .unfreezing import set_training


class TrainedNetwork:
    """Legend: B pictures of this rank's part of a batch, C classes.

    Args:
        drop_path: whether blocks are dropped by chance in stages that are trained.
        batch_norms: whether batch norms of stages that are trained train, too.
        precision: see `core.precision`.
        compile: call the model through torch.compile.
    """

    def __init__(
        self,
        model: PictureClassifier,
        *,
        drop_path: bool,
        batch_norms: bool,
        precision: str,
        compile: bool,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._stages = model.encoder.stages()
        self._drop_path, self._batch_norms = drop_path, batch_norms
        self._precision, self._compile, self._ranks = precision, compile, ranks
        self._norms: list[nn.Module] = []
        # A graph a shape: there are two a rank, and a general one would be slower.
        compiled: Any = torch.compile(model, dynamic=False) if compile else model
        self._compiled: nn.Module = compiled
        self._wrapped: nn.Module = compiled

    @property
    def num_stages(self) -> int:
        """Stages of the backbone."""
        return len(self._stages)

    @property
    def moves_buffers(self) -> bool:
        """Whether training changes statistics of batch norms."""
        return bool(self._norms)

    def enter_epoch(self, num_unfrozen: int) -> None:
        """Set what is trained; to be called before every epoch, as validation changes modes."""
        self._norms = set_training(
            self._model.encoder,
            self._model.head,
            self._stages[len(self._stages) - num_unfrozen :],
            drop_path=self._drop_path,
            batch_norms=self._batch_norms,
        )
        # Every epoch, although it is needed only when more is unfrozen: DDP changes the order of
        # its sums after its first step, and a resumed run is to change it in the same places.
        self._wrapped = self._ranks.wrap(self._compiled)

    def __call__(self, images_B3hw: Tensor) -> Tensor:
        """Float32 logits [B, C] of float pictures in 0..1."""
        for norm in self._norms:
            norm.train(len(images_B3hw) > 1)  # one picture is no batch to normalise by
        images = images_B3hw.contiguous(memory_format=torch.channels_last)
        with _blaming_compiler(self._compile), autocast(images.device, self._precision):
            logits_BC: Tensor = self._wrapped(images)
        return logits_BC.float()

    def keeping_gradients(self) -> AbstractContextManager[None]:
        """Around forward and backward passes whose gradients wait for those of later batches
        before they are averaged over ranks."""
        no_sync = getattr(self._wrapped, "no_sync", nullcontext)
        waiting: AbstractContextManager[None] = no_sync()
        return waiting


@contextmanager
def _blaming_compiler(compiled: bool) -> Iterator[None]:
    """The compiler's own errors are what a person asked for by `compile`; others pass."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model cannot be compiled: {reason}",
            where="compile",
            hint="train it without, or install what torch.compile needs (a C++ compiler on CPUs)",
        ) from error
