"""What the benchmarks share: arguments, the data they run on, fair timing, a table, JSON.

Real posters are used if POSTERS_DIR is set (and pretrained weights if WEIGHTS_DIR is), else drawn
pictures, random weights and random features of the same shapes; each report says which.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch and MLflow are imported. `tuner` sets the same for its workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

NUM_IMAGES, NUM_CLASSES = 7254, 25
"""Of the real set."""
LABELS_PER_IMAGE = 2.33
# Wide enough for the tables also where the output goes to a file.
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run of a benchmark."""

    name: str
    quick: bool
    """A smoke run: small numbers that show that it works, and nothing else."""
    json: Path | None
    scratch: Path
    """An empty folder that is removed at the end."""
    figures: dict[str, Any]
    """What is written as JSON."""

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@contextmanager
def benchmark(name: str, purpose: str) -> Iterator[Bench]:
    """Read the arguments, say where this runs, and write the figures at the end."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--quick", action="store_true", help="a smoke run, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as scratch:
        bench = Bench(
            name=name,
            quick=arguments.quick,
            json=arguments.json,
            scratch=Path(scratch),
            figures={"benchmark": name, "quick": arguments.quick, "machine": machine()},
        )
        console.print(f"[bold]{name}[/]: {purpose}")
        console.print(" ".join(f"{key}={value}" for key, value in machine().items()))
        if bench.quick:
            console.print("[yellow]--quick: a smoke run; its figures say nothing[/]")
        yield bench
    bench.figures["seconds"] = time.perf_counter() - started
    if bench.json is not None:
        bench.json.write_text(json.dumps(bench.figures, indent=1))
    console.print(f"took {bench.figures['seconds']:.0f} s\n")


def machine() -> dict[str, Any]:
    """What figures depend on."""
    model = platform.processor()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def medians(jobs: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each job. They take turns, so that a busy spell hits all alike; one
    round goes before that is not counted."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with equal keys."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for key in rows[0]:
        is_text = isinstance(rows[0][key], str)
        table.add_column(key, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def verdict(bar: str, *, figure: float, at_least: float | None = None, at_most: float = 0) -> bool:
    """Print whether a bar is met; either side of it can be given."""
    met = figure >= at_least if at_least is not None else figure <= at_most
    word = "[green]met[/]" if met else "[red]missed[/]"
    limit = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    console.print(f"bar: {bar}: {figure:.3g} ({limit}): {word}")
    return met


def random_targets(num_images: int, seed: int = 0) -> torch.Tensor:
    """0/1 targets [N, C], float32: classes as uneven as those of posters, none empty."""
    rng = np.random.default_rng(seed)
    shares_C = 1 / np.arange(1, NUM_CLASSES + 1)
    shares_C *= LABELS_PER_IMAGE / shares_C.sum()
    targets_NC = rng.random((num_images, NUM_CLASSES)) < np.minimum(shares_C, 0.6)
    targets_NC[np.arange(num_images), np.arange(num_images) % NUM_CLASSES] |= ~targets_NC.any(1)
    targets_NC[:NUM_CLASSES] |= np.eye(NUM_CLASSES, dtype=bool)
    return torch.from_numpy(targets_NC).float()


def random_features(num_images: int, num_features: int, seed: int = 0) -> np.ndarray:
    """Features [N, D], float32, as unscaled as a network's: positive, sparse."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((num_images, num_features), np.float32), 0)


def split_rows(num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows in the shares of `core.data.split`: 72 % and 13 %."""
    order = np.random.default_rng(seed).permutation(num_images)
    train, validation = round(0.7225 * num_images), round(0.1275 * num_images)
    return np.sort(order[:train]), np.sort(order[train : train + validation])


def poster_table(bench: Bench, num_images: int) -> tuple[Any, str]:
    """A `core.data.table.Table` of at most so many pictures, and what it is."""
    from core.data.table import read_table
    from core.synth import draw_posters

    if folder := os.environ.get("POSTERS_DIR"):
        table = read_table(folder)
        rows = np.random.default_rng(0).permutation(table.num_images)[:num_images]
        return table.select([int(row) for row in np.sort(rows)]), f"{num_images} real posters"
    folder = bench.scratch / "posters"
    draw_posters(folder, num_images=max(num_images, 300))
    table = read_table(folder)
    return table.select(range(num_images)), f"{num_images} drawn posters (POSTERS_DIR not set)"


def weights_at_hand() -> tuple[str, Path | None, str]:
    """`weights` and `weights_dir` of `build_encoder`, and what they are."""
    if folder := os.environ.get("WEIGHTS_DIR"):
        return "auto", Path(folder), "pretrained weights"
    return "none", None, "random weights (WEIGHTS_DIR not set)"


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
