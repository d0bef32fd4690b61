"""The real command in this process, on a small table, with a home of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from ..lossy_proxy import LossyProxy, lossy_proxy
from ..servers import mlflow_server

NUM_IMAGES = 24
CLASSES = ("Action", "Drama", "N/A", "War")
SPACE = """\
name: tiny
trials: 2
parameters: {backbone: ffn, head: linear, lr: [0.01, 0.1], batch_size: 8, epochs: 2}
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What one run of `tuner` left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server on sqlite; each test writes a study of its own `name`."""
    from tuner.tracking.mlflow_store import quiet_mlflow

    quiet_mlflow()
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as address:
        yield address


@pytest.fixture
def tracking_proxy(tracking_server: str) -> Iterator[LossyProxy]:
    """A proxy before that server, which loses what the test says."""
    with lossy_proxy(tracking_server) as proxy:
        yield proxy


@pytest.fixture
def quick_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is tried again almost at once."""
    monkeypatch.setattr("tuner.tracking.delivery.FIRST_PAUSE", 0.02)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a study that no other test has."""
    return "".join(c if c.isalnum() else "-" for c in str(request.node.name))[:80]


@pytest.fixture
def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str | None]:
    """The storage URL of a kind; PostgreSQL is started only if it is asked for."""

    def find(kind: str) -> str | None:
        if kind == "postgresql":
            url: str = request.getfixturevalue("postgres").url
            return url
        return f"sqlite:///{tmp_path}/optuna.db" if kind == "sqlite" else None

    return find


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 small pictures of noise, 0.png to 23.png, in 4 classes; each class has many of each."""
    folder = tmp_path / "posters"
    folder.mkdir()
    lines = [",".join(("Id", *CLASSES))]
    for row in range(NUM_IMAGES):
        pixels = np.random.default_rng(row).integers(0, 256, (24, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        lines.append(f"{row},{row % 2},{row // 2 % 2},{row // 4 % 2},{int(row % 3 == 0)}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A space that needs no weights."""
    path = tmp_path / "tiny.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TUNER_HOME, not made yet; no address from outside."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNER_HOME", str(folder))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def tuner(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs `tuner ARGS` through its entry point. A Ray must not start: that is a failure here."""
    import tuner.search
    from tuner.cli.main import main

    @contextlib.contextmanager
    def no_cluster(address: str) -> Iterator[NoReturn]:
        pytest.fail("a search was about to start")
        yield  # pragma: no cover

    monkeypatch.setattr(tuner.search, "cluster", no_cluster)

    def run(*args: Any) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tuner", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return Ended(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture(scope="session")
def _mlflow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with one registered model, and one study that this machine does not have."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("posters", artifact_location=(folder / "a").as_uri())
    run = client.create_run(
        experiment, tags={"tuner.study": "tiny-1", "tuner.trial": "study"}, run_name="tiny-1"
    )
    client.create_registered_model("posters")
    client.create_model_version("posters", source=run.info.artifact_uri, run_id=run.info.run_id)
    client.set_registered_model_alias("posters", "challenger", "1")
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_store(_mlflow_file: Path, home: Path) -> Path:
    """That store as the home's own."""
    home.mkdir()
    return Path(shutil.copy(_mlflow_file, home / "mlflow.db"))


@pytest.fixture
def refused(tuner: Command, home: Path) -> Callable[..., str]:
    """Runs a command that must be refused with a message that holds these texts, in this order."""

    def check(*args: Any, says: tuple[str, ...], writes: bool = False) -> str:
        ended = tuner(*args)
        assert ended.code == 2, (ended.code, ended.out, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.startswith(("error: ", "Usage: "))
        assert re.search(".*".join(map(re.escape, says)), ended.err, re.DOTALL), ended.err
        if not writes:
            files = [path for path in home.rglob("*") if path.is_file()]
            assert not files, "something was written"
            assert not list((home / "studies").glob("*")), "the study's name is taken"
        return str(ended.err)

    return check
