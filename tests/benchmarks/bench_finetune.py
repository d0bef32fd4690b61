"""Fine-tuning against its limit: pictures/s beside a bare loop, and two workers beside one.

Bare: the same model, batch and precision on float pictures that are in memory already; forward,
backward, one fused step of torch's optimizer. Ours reads bytes from a memory-mapped file, shuffles,
augments, keeps metrics, and validates a few pictures after each epoch. On a GPU the two backbones
of the project's bar are taken, at 224 px.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import NUM_CLASSES, Bench, benchmark, console, show, verdict

from core.config import TrialConfig
from core.encoding.encoders import build_encoder
from core.finetuning.finetune import finetune
from core.finetuning.ranks import joined_ranks
from core.head_settings import head_settings
from core.models.classifier import build_classifier
from core.precision import autocast, inference_precision

BATCH = 32
STEP = 64
"""Pictures of a step of two workers, 32 each, and of the one that they are compared with."""
VALIDATED = 32
"""Pictures validated after each epoch: they count as time, not as pictures."""
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "mirrored": {"horizontal_flip": True},
    "mirrored and cropped": {"horizontal_flip": True, "min_crop_scale": 0.6},
    "RandAugment, too": {
        "horizontal_flip": True,
        "min_crop_scale": 0.6,
        "randaugment_magnitude": 9,
    },
}


def settings(backbone: str, size: int, epochs: int, **further: Any) -> dict[str, Any]:
    return {
        "mode": "finetune",
        "backbone": backbone,
        "image_size": size,
        "unfrozen_stages": 9,
        "batch_size": BATCH,
        "epochs": epochs,
        "lr": 1e-4,
        **further,
    }


def random_pictures(folder: Path, num_images: int, size: int) -> np.ndarray:
    """Decoded pictures as the cache holds them, memory-mapped."""
    path = folder / f"{num_images}-{size}.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        np.save(path, rng.integers(0, 256, (num_images, size, size, 3), np.uint8))
    return np.load(path, mmap_mode="r")


def ours(values: dict[str, Any], pictures: np.ndarray, ranks: Any = None) -> list[float]:
    """Seconds of each epoch but the first, in which memory is found and kernels are chosen."""
    config = TrialConfig.from_dict(values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = torch.zeros(len(pictures), NUM_CLASSES)
    targets[:, :3] = 1
    times: list[float] = []

    def report(epoch: int, metrics: Any) -> bool:
        times.append(time.perf_counter())
        return False

    rows = np.arange(len(pictures))
    finetune(
        build_encoder(config.backbone, weights="none", input_size=config.image_size, seed=0),
        pictures,
        targets,
        rows[VALIDATED:],
        rows[:VALIDATED],
        config,
        report=report,
        device=device,
        precision=inference_precision(device),
        **({} if ranks is None else {"ranks": ranks}),
    )
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def bare(values: dict[str, Any], num_images: int) -> Iterator[float]:
    """Seconds of one epoch after the other."""
    config = TrialConfig.from_dict(values)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build_encoder(config.backbone, weights="none", input_size=config.image_size, seed=0)
    model = build_classifier(
        encoder,
        head_settings(config),
        num_classes=NUM_CLASSES,
        pooling=config.pooling,
        blocks=1,
        device=device,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    images = torch.rand(BATCH, 3, encoder.backbone.input_size, encoder.backbone.input_size)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(BATCH, NUM_CLASSES, device=device)
    targets[:, :3] = 1
    precision = inference_precision(device.type)
    while True:
        started = time.perf_counter()
        for start in range(VALIDATED, num_images, BATCH):
            size = min(BATCH, num_images - start)
            with autocast(device, precision):
                logits = model(images[:size])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), targets[:size]
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def against_bare(bench: Bench, backbone: str, size: int, num_images: int) -> dict[str, Any]:
    """Medians of epochs, ours and the bare ones in turns, for every kind of augmentation."""
    pictures = random_pictures(bench.scratch, num_images, size)
    trained = num_images - VALIDATED
    repeats = bench.size(3, 1)
    plain = bare(settings(backbone, size, 1), num_images)
    next(plain)
    bare_s: list[float] = []
    ours_s: dict[str, list[float]] = {name: [] for name in AUGMENTATIONS}
    for _ in range(repeats):
        for name, further in AUGMENTATIONS.items():
            bare_s.append(next(plain))
            ours_s[name] += ours(settings(backbone, size, 3, **further), pictures)
            bare_s.append(next(plain))
    limit = trained / statistics.median(bare_s)
    row: dict[str, Any] = {"backbone": f"{backbone}, {size} px", "bare, pictures/s": limit}
    for name, seconds in ours_s.items():
        row[f"{name}, share"] = trained / statistics.median(seconds) / limit
    return row


def run_rank(job: dict[str, Any]) -> None:
    """One process of several, on one core."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{job['port']}",
        rank=job["rank"],
        world_size=job["count"],
    )
    pictures = np.load(job["pictures"], mmap_mode="r")
    seconds = ours(job["settings"], pictures, joined_ranks())
    if job["rank"] == 0:
        print(json.dumps(seconds))
    torch.distributed.destroy_process_group()


def pictures_per_s(sizes: Sequence[int], path: Path, values: dict[str, Any]) -> float:
    """Of groups of so many processes of one core each, all groups at once, each on its own."""
    jobs = [
        {"rank": rank, "count": count, "port": port, "pictures": str(path), "settings": values}
        for count, port in zip(sizes, free_ports(len(sizes)), strict=True)
        for rank in range(count)
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", json.dumps(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
        )
        for job in jobs
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("a worker failed")
    first = [output for job, output in zip(jobs, outputs, strict=True) if job["rank"] == 0]
    seconds = [statistics.median(json.loads(o.strip().splitlines()[-1])) for o in first]
    num_trained = len(np.load(path, mmap_mode="r")) - VALIDATED
    return sum(num_trained / s for s in seconds)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def two_against_one(bench: Bench, backbone: str, size: int, num_images: int) -> dict[str, Any]:
    """Two workers of a trial, one alone, and two that have a trial each: what the machine gives
    at most, as they wait for nobody and share only its memory."""
    random_pictures(bench.scratch, num_images, size)
    path = bench.scratch / f"{num_images}-{size}.npy"
    epochs = bench.size(4, 2)
    values = settings(backbone, size, epochs, batch_size=STEP, horizontal_flip=True)
    ways: dict[str, Sequence[int]] = {"one": [1], "two": [2], "apart": [1, 1]}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.size(3, 1)):
        for name, sizes in ways.items():
            found[name].append(pictures_per_s(sizes, path, values))
    one, two, apart = (statistics.median(found[name]) for name in ways)
    return {
        "backbone": f"{backbone}, {size} px",
        "one worker, pictures/s": one,
        "two workers": two,
        "ratio": two / one,
        "two trials apart": apart,
        "most": apart / one,
    }


def main() -> None:
    with benchmark("finetune", "fine-tuning against a bare loop, and two workers against one") as b:
        on_gpu = torch.cuda.is_available()
        num_images = b.size(20_000 if on_gpu else 800, 96)
        if on_gpu:
            models = [("resnet50", 224), ("convnext_tiny", 224)]
        else:
            models = [("squeezenet1_1", 128)] if not b.quick else [("squeezenet1_1", 64)]
        console.print(
            f"{num_images:,} random pictures, batches of {BATCH}, all stages trained, "
            f"{inference_precision('cuda' if on_gpu else 'cpu')}"
        )
        rows = [against_bare(b, *model, num_images) for model in models]
        show("pictures/s of training, as a share of the bare loop", rows)
        b.figures["rows"] = rows
        for row in rows:
            for name in AUGMENTATIONS:
                share = row[f"{name}, share"]
                b.figures[f"met {row['backbone']} {name}"] = verdict(
                    f"{row['backbone']}, {name}", figure=share, at_least=0.95
                )
        if on_gpu:
            return
        row = two_against_one(b, *models[0], num_images)
        show("two workers of one core each against one (gloo)", [row])
        b.figures["workers"] = row
        b.figures["met_workers"] = verdict(
            "two workers over one", figure=row["ratio"], at_least=1.7
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(json.loads(sys.argv[2]))
    else:
        main()
