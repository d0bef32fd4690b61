"""The direction of imports (DESIGN.md, "Layers") and the limits of the house style, held by tests.

Imports are read from the source with `ast`, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
import graphlib
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import core
import tuner

ROOT = Path(__file__).parents[2]
PROJECT = {"core", "tuner", "search_spaces", "deploy", "tests"}
# A new dependency of `core` is a decision: it is shipped inside every saved model.
CORE_MAY_IMPORT = {
    "PIL",
    "huggingface_hub",  # comes with timm, which fetches its weights through it
    "numpy",
    "onnxruntime",
    "pandas",
    "safetensors",
    "numba",
    "timm",
    "torch",
    "torchvision",
}
HEAVY = ("torch", "torchvision", "ray", "mlflow", "optuna", "pandas", "timm", "onnxruntime")


def python_files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import: level 0 is absolute, 1 is `from .x import y`.

    Calls of `import_module` and `__import__` with a literal name count as absolute imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield 0, str(argument.value)


def module_of(path: Path) -> str:
    """`core.synth.looks`; a package for its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def absolute(path: Path, level: int, name: str) -> str:
    """The dotted name that an import in this file means."""
    if level == 0:
        return name
    folder = ".".join(path.relative_to(ROOT).parts[: -1 - (level - 1)])
    return f"{folder}.{name}" if folder else f"(above the project).{name}"


def roots_of(path: Path) -> set[str]:
    """The first names of all absolute imports of a file."""
    return {name.split(".")[0] for level, name in imports_of(path.read_text()) if level == 0}


# ---------------------------------------------------------------- the walk sees everything


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import ray.tune, torch as t
from mlflow.entities import Run
from . import losses
from .heads import HEADS
from .. import above
if TYPE_CHECKING:
    import optuna
def later():
    from tuner import space
    importlib.import_module("timm.models")
    __import__("deploy")
"""
    assert sorted(imports_of(source)) == [
        (0, "deploy"),
        (0, "mlflow.entities"),
        (0, "optuna"),
        (0, "ray.tune"),
        (0, "timm.models"),
        (0, "torch"),
        (0, "tuner"),
        (1, "heads"),
        (1, "losses"),
        (2, "above"),
    ]


def test_the_walk_covers_every_module_of_the_packages() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inner = {module_of(path) for path in ROOT.glob("*/*/__init__.py") if path.parts[-3] != "tests"}
    assert set(packages["packages"]) == {"core", "tuner", "search_spaces"} | inner
    for package in (core, tuner):
        found = {module_of(path) for path in python_files(package.__name__)}
        walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        assert found == {module.name for module in walk} | {package.__name__}
    assert not python_files("search_spaces"), "search_spaces/ is data, no code"


# ---------------------------------------------------------------- layers

CORE_FILES = python_files("core")
TUNER_FILES = python_files("tuner")


@pytest.mark.parametrize("path", CORE_FILES, ids=module_of)
def test_core_imports_only_itself_and_its_few_dependencies(path: Path) -> None:
    allowed = CORE_MAY_IMPORT | sys.stdlib_module_names
    assert roots_of(path) <= allowed, f"{path.name} imports {roots_of(path) - allowed}"


@pytest.mark.parametrize("path", CORE_FILES, ids=module_of)
def test_core_imports_itself_relatively_and_stays_inside(path: Path) -> None:
    # It is shipped under another name inside saved models, where `core` means nothing.
    modules = {module_of(p) for p in CORE_FILES}
    for level, name in imports_of(path.read_text()):
        if level:
            target = absolute(path, level, name)
            assert target in modules, f"{path.name} imports {target}, which is not in core"


@pytest.mark.parametrize("path", TUNER_FILES, ids=module_of)
def test_tuner_imports_neither_deploy_nor_tests(path: Path) -> None:
    assert not roots_of(path) & {"deploy", "tests"}
    assert all(level <= 2 for level, _ in imports_of(path.read_text()))


def test_the_script_inside_saved_models_stands_alone() -> None:
    source = (ROOT / "tuner" / "tracking" / "serving_model.py").read_text()
    assert not [name for level, name in imports_of(source) if level or name in PROJECT]
    assert not roots_of(ROOT / "tuner" / "tracking" / "serving_model.py") & PROJECT


def test_deploy_imports_nothing_of_the_project() -> None:
    importing = {p.name: roots_of(p) & PROJECT for p in python_files("deploy")}
    assert not any(importing.values()), importing


def test_no_library_module_imports_an_entry_point() -> None:
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = {target.split(":")[0].removeprefix("tuner.") for target in entry_points.values()}
    assert modules == {"cli.main"}
    for path in CORE_FILES + TUNER_FILES:
        if path.parent.name != "cli" and path.stem != "__main__":
            names = {absolute(path, *imported) for imported in imports_of(path.read_text())}
            assert not any(n.startswith("tuner.cli") for n in names), f"{path.name} imports it"


@pytest.mark.parametrize("package", ["core", "tuner"])
def test_modules_do_not_import_each_other_in_a_circle(package: str) -> None:
    files = {module_of(path): path for path in python_files(package)}
    graph = {
        module: {
            absolute(path, level, name)
            for level, name in _imports_when_loaded(ast.parse(path.read_text()).body)
        }
        & files.keys()
        for module, path in files.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert set(order) == set(files)


def _imports_when_loaded(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Imports at the top of a module: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports_of(ast.unparse(node))


# ---------------------------------------------------------------- light imports


@pytest.mark.parametrize("package", ["core", "tuner"])
def test_a_bare_import_stays_light(package: str) -> None:
    code = f"import sys, {package}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- house style


def test_no_file_is_a_drawer_for_everything() -> None:
    files = [p for folder in PROJECT for p in python_files(folder)]
    assert files
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [str(p.relative_to(ROOT)) for p in files if p.stem in drawers]


def test_folders_are_at_most_two_deep() -> None:
    folders = [
        path.relative_to(ROOT)
        for top in PROJECT
        for path in (ROOT / top).rglob("*")
        if path.is_dir() and not any(p.startswith((".", "__")) for p in path.parts)
    ]
    assert Path("tests/core") in folders
    assert not [str(folder) for folder in folders if len(folder.parts) > 2]


@pytest.mark.parametrize(
    "path", [p for p in CORE_FILES + TUNER_FILES if p.stem == "__init__"], ids=module_of
)
def test_init_holds_only_a_docstring_re_exports_and_all(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert [ast.unparse(node) for node in body if not _belongs_in_init(node)] == []


def _belongs_in_init(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.ImportFrom):
        return node.level == 1 or node.module == "__future__"
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


@pytest.mark.parametrize(
    "code", ["import torch", "x = 1", "def f(): pass", "f()", "from core import x"]
)
def test_init_check_refuses_code(code: str) -> None:
    assert not _belongs_in_init(ast.parse(code).body[0])
