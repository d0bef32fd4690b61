"""The repository as a whole: its README's file tree, its pins, and what no file may say.

Files are found by walking the checkout and leaving out what `.gitignore` names, so that the tests
also run where there is no git.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TREE_FOLDERS = ("core", "tuner", "search_spaces")
"""Folders of which the README shows every file."""
TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "core",
    "deploy",
    "pyproject.toml",
    "search_spaces",
    "tests",
    "tuner",
}

# Put together here, so that this file does not hold what it looks for.
INDEX_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pypi", "python", "org"),
        ("download", "pytorch", "org/whl"),
        ("registry", "npmjs", "org"),
        ("registry", "yarnpkg", "com"),
        ("deb", "debian", "org"),
        ("conda", "anaconda", "org"),
    )
)
MACHINE_PATH = re.compile(r"(?<![\w.~}$)-])/(?:work|root|tmp|home|Users)/[\w.][\w./-]*")
"""An absolute path into somebody's machine; `a/work/b`, `~/tmp/b` and `$X/tmp/b` are none."""
IMAGE_PATHS = ("/tmp/ray", "/home/ray")
"""The public Ray image's own folders, which manifests may name."""


def _ignored_names() -> list[str]:
    patterns = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()]
    patterns = [line for line in patterns if line and not line.startswith("#")]
    for pattern in patterns:
        assert not pattern.startswith("!") and "/" not in pattern.rstrip("/"), (
            f".gitignore: {pattern!r} is more than a name, which this walk does not understand"
        )
    return [".git", *(pattern.rstrip("/") for pattern in patterns)]


def _walk() -> Iterator[str]:
    """Every file that git would track, relative to the root."""
    ignored = _ignored_names()
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = [s for s in subfolders if not any(fnmatch(s, name) for name in ignored)]
        for file in files:
            if not any(fnmatch(file, name) for name in ignored):
                yield (Path(folder) / file).relative_to(ROOT).as_posix()


FILES = sorted(_walk())


def _read_tree(markdown: str) -> dict[str, str]:
    """The README's tree: each path (folders end in `/`) and its line of description.

    The tree is the fenced block with a line that starts with `core/`. Two spaces a level; a name,
    two spaces or more, a description. A path on one line (`.ci/run`) is as good as two lines.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    trees = [block for block in blocks if re.search(r"^core/", block, re.MULTILINE)]
    assert len(trees) == 1, f"one fenced block with a line `core/` is wanted, found {len(trees)}"
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, trees[0].splitlines()):
        match = re.fullmatch(r"((?:  )*)(\S+)(?: {2,}(\S.*))?", line.rstrip())
        assert match, f"not `name  description`, indented by two spaces a level: {line!r}"
        level = len(match[1]) // 2
        assert level <= len(folders), f"indented under no folder: {line!r}"
        folders = folders[:level]
        path = "".join(folders) + match[2]
        assert path not in tree, f"listed twice: {path}"
        tree[path] = match[3] or ""
        if path.endswith("/"):
            folders.append(match[2])
    return tree


def _shown_in_tree(path: str) -> bool:
    return "/" not in path or path.split("/")[0] in TREE_FOLDERS


def test_readme_tree_lists_every_file() -> None:
    tree = _read_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    expected = {path for path in FILES if _shown_in_tree(path)}
    assert not expected - tree.keys(), "these files are not in the README's tree"
    listed_files = {path for path in tree if not path.endswith("/")}
    assert not listed_files - set(FILES), "these files of the README's tree do not exist"
    folders = {path for path in tree if path.endswith("/")}
    assert not {path for path in folders if not (ROOT / path).is_dir()}
    top_folders = {path.split("/")[0] for path in FILES if "/" in path}
    assert not top_folders - {path.split("/")[0] for path in tree}
    assert not {path for path in expected if not tree[path]}, "these files lack a description"


def test_tree_is_read_as_written() -> None:
    block = "Makefile  commands\n\ncore/\n  a.py   what it is\n.ci/run  CI"
    tree = _read_tree(f"```sh\nls\n```\n```text\n{block}\n```")
    assert tree == {
        "Makefile": "commands",
        "core/": "",
        "core/a.py": "what it is",
        ".ci/run": "CI",
    }
    for block, complaint in {
        "core/\n    a.py  too deep": "under no folder",
        "core/\n a.py  odd": "two spaces a level",
        "core/\ncore/": "listed twice",
        "tuner/": "found 0",
    }.items():
        with pytest.raises(AssertionError, match=complaint):
            _read_tree(f"```\n{block}\n```")


def test_top_level_holds_nothing_else() -> None:
    found = {path.split("/")[0] for path in FILES}
    assert found <= TOP_LEVEL, "a new top-level entry needs a good reason, and a line in TOP_LEVEL"
    assert {"README.md", "pyproject.toml", *TREE_FOLDERS} <= found


def _texts() -> Iterator[tuple[str, str]]:
    for path in FILES:
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:
            yield path, content.decode("utf-8")


def test_no_file_names_a_package_index() -> None:
    named = [(path, host) for path, text in _texts() for host in INDEX_HOSTS if host in text]
    assert not named


def test_no_file_names_a_path_of_one_machine() -> None:
    named = [
        (path, match[0])
        for path, text in _texts()
        for match in MACHINE_PATH.finditer(text)
        if not match[0].startswith(IMAGE_PATHS)
    ]
    assert not named


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open('/{}/main/a.csv')", True),
        ("sqlite:////{}/a.db", True),
        ("run from =/{}/x", True),
        ("the net{}/model.py", False),
        ("~/{}/a", False),
        ("../{}/a", False),
        ("$HOME/{}/a", False),
        ("https://example.com/{}/a", False),
    ],
)
def test_machine_paths_are_told_from_others(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line.format("work"))) is found


def _pins() -> list[Requirement]:
    """The lines of constraints.txt, each checked to be one pinned version with its hashes."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    pins = []
    for line in filter(None, text.splitlines()):
        match = re.fullmatch(r"(\S[^@]*?)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
        assert match, f"constraints.txt: not a pinned version with hashes: {line[:80]!r}"
        pin = Requirement(match[1])
        assert [s.operator for s in pin.specifier] == ["=="] and "*" not in str(pin.specifier), line
        pins.append(pin)
    return pins


def _requirements(project: dict[str, Any]) -> list[Requirement]:
    """All that pyproject.toml asks for: to build, to run, with every extra, to develop."""
    lists = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    return [Requirement(text) for texts in lists for text in texts]


def test_constraints_meet_pyproject() -> None:
    pins = _pins()
    requirements = _requirements(_pyproject())
    assert "uv" in {pin.name for pin in pins}, "set-up installs uv from constraints.txt"
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        versions = [next(iter(p.specifier)).version for p in pins if p.name == name]
        assert versions, f"{name} is not in constraints.txt: run `make lock`"
        for version in versions:
            assert requirement.specifier.contains(version, prereleases=True), (
                f"constraints.txt has {name} {version}, pyproject.toml asks for {requirement}: "
                "run `make lock`"
            )


def test_constraints_name_each_package_once_here() -> None:
    here = [pin.name for pin in _pins() if pin.marker is None or pin.marker.evaluate()]
    assert len(here) == len(set(here))


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_changelog_knows_the_version() -> None:
    version = _pyproject()["project"]["version"]
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {version, "Unreleased"} & set(headings)
    assert len(headings) == len(set(headings))


def test_make_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    done = subprocess.run(
        ["make"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    listed = set(re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE))
    assert listed == set(phony[1].split()) - {"FORCE"}


def test_ci_runs_the_same_commands_as_people() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^make (\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == ["setup", "lint", "test"]


def test_contributing_names_dicts_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = re.findall(r"`([A-Z]+)` in `((?:core|tuner)/[\w/]+\.py)`", text)
    assert len(places) == 7
    for name, path in places:
        assert re.search(rf"^{name}: dict\[", (ROOT / path).read_text(), re.MULTILINE), (name, path)
