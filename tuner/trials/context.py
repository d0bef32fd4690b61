"""What the workers of a study share, and what a trial reads.

Ray puts a `Context` into its object store once; paths in it are on storage that every worker
sees. Imports of torch wait until a worker needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import TrialConfig
from core.data.split import Split
from core.data.table import Table
from core.images.views import PLAIN, VIEWS

if TYPE_CHECKING:
    import torch

    from core.encoding.encoders import Encoder

    from ..home import Home
    from ..studies.study import Study


@dataclass(frozen=True, kw_only=True)
class Context:
    """A study as its workers see it."""

    study: str
    table: Table
    split: Split
    pictures: str
    """Fingerprint of the picture contents, in row order."""
    objective: str
    seed: int
    """Seeds the order of batches, which all trials share."""
    cache: Path
    folder: Path
    """The study's own folder."""
    weights: str
    """`auto` or `none`: see `core.encoding.encoders.build_encoder`."""
    weights_dir: Path | None
    rungs: tuple[int, ...]
    """Epochs after which trials may be stopped, ascending."""
    precision: str
    """In which backbones are computed, on every worker alike: see `core.precision`."""
    num_threads: int
    """CPU threads of a worker: its share of the machine."""
    outputs: Path | None = None
    """Where fine-tuning keeps weights and checkpoints; None: in `folder`."""
    memory_bytes: int | None = None
    """What a worker's training may take; None: its share of what its device has free."""
    memory_share: float = 1.0
    """A worker's share of its machine's memory, or of its GPU's."""

    def state_path(self, number: int) -> Path:
        """Where the weights of fine-tuned trial `number` are kept."""
        return (self.outputs or self.folder) / "states" / f"{number:06d}.safetensors"

    def checkpoint_folder(self, number: int) -> Path:
        """Where fine-tuning trial `number` keeps its checkpoints while it runs."""
        return (self.outputs or self.folder) / "checkpoints" / f"{number:06d}"


def context_of(
    study: Study,
    home: Home,
    table: Table,
    split: Split,
    *,
    rungs: tuple[int, ...],
    device_type: str,
    num_threads: int,
) -> Context:
    """What workers on devices of this type, with so many threads each, see of a study."""
    from core.precision import inference_precision

    record = study.record
    return Context(
        study=record.name,
        table=table,
        split=split,
        pictures=table.picture_fingerprint(),
        objective=study.space().objective,
        seed=record.seed,
        cache=home.cache,
        folder=study.folder,
        weights=record.weights,
        weights_dir=Path(record.weights_dir) if record.weights_dir else None,
        rungs=rungs,
        precision=inference_precision(device_type),
        num_threads=num_threads,
        memory_bytes=home.memory_limit,
    )


@dataclass(frozen=True, kw_only=True, order=True)
class FeatureRequest:
    """One matrix that trials read. Trials that validate on the same one can share a cohort,
    whichever further views they train on."""

    backbone: str
    image_size: int
    """Side of the pictures; 0 for the backbone's own."""
    pooling: str
    """`map`, `pixels` for the decoded pictures that fine-tuning reads, or one of
    `core.encoding.pooling.POOLINGS`."""
    blocks: int = 1
    """Stages that pooled features are taken from."""
    view: str = PLAIN.name
    """See `core.images.views.View.name`."""

    @property
    def label(self) -> str:
        """For people."""
        size = f" at {self.image_size} px" if self.image_size else ""
        blocks = f", last {self.blocks} blocks" if self.blocks > 1 else ""
        view = f", {self.view}" if self.view != PLAIN.name else ""
        return f"{self.backbone}{size} ({self.pooling}{blocks}{view})"


def request_of(config: TrialConfig) -> FeatureRequest:
    """What this trial reads of the plain pictures."""
    return feature_request(
        mode=config.mode,
        backbone=config.backbone,
        head=config.head,
        pooling=config.pooling,
        blocks=config.blocks,
        image_size=config.image_size or 0,
    )


def feature_request(
    *, mode: str, backbone: str, head: str, pooling: str, blocks: int, image_size: int
) -> FeatureRequest:
    """What a trial with these settings reads of the plain pictures; `image_size` 0 is the
    backbone's own."""
    from core.encoding.features import MAP, PIXELS
    from core.heads import HEADS

    if mode == "finetune":
        pooling, blocks = PIXELS, 1
    elif HEADS[head].spatial:
        pooling, blocks = MAP, 1
    return FeatureRequest(backbone=backbone, image_size=image_size, pooling=pooling, blocks=blocks)


def view_requests(plain: FeatureRequest, views: str) -> list[FeatureRequest]:
    """The request of each view that `TrialConfig.views` names, the plain one first. Decoded
    pictures have no further ones."""
    from core.encoding.features import PIXELS

    if plain.pooling == PIXELS:
        return [plain]
    return [dataclasses.replace(plain, view=view.name) for view in VIEWS[views]]


def view_folders(features: Mapping[FeatureRequest, str], plain: FeatureRequest) -> dict[str, str]:
    """View's name -> folder of its matrix, for every view there is of a request's features.

    Raises KeyError if there is no plain one.
    """
    others = {
        request.view: folder
        for request, folder in sorted(features.items())
        if dataclasses.replace(request, view=plain.view) == plain
    }
    return {plain.view: features[plain], **others}


def bytes_in_memory(request: FeatureRequest, folder: str) -> int:
    """What a process that reads a matrix holds of it; maps and pictures stay on the disk."""
    from core.encoding.features import MAP, PIXELS

    file = Path(folder) / "matrix.npy"
    return 0 if request.pooling in (MAP, PIXELS) or not file.exists() else file.stat().st_size


def prepare_worker(context: Context) -> torch.device:
    """Set this process' threads to its share of cores; returns the device to use."""
    import torch

    torch.set_num_threads(context.num_threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_backbone(context: Context, request: FeatureRequest) -> Encoder:
    """The encoder of a request, with the weights that the study uses.

    Raises InputError if they are not at hand, or for fewer stages than the request reads.
    """
    from core.encoding.encoders import build_encoder

    encoder = build_encoder(
        request.backbone,
        weights=context.weights,
        weights_dir=context.weights_dir,
        input_size=request.image_size or None,
        seed=0,
    )
    encoder.check_blocks(request.blocks)
    return encoder
