"""Where a setting was written, so that an error can point at its file, line and key.

Reads YAML as version 1.2 means it (`1e-3` is a number, `no` and `off` are words), which PyYAML by
itself does not; keeps the line of every key; refuses a key that is given twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from core.errors import InputError

KeyPath: TypeAlias = tuple[str | int, ...]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The name of what was read, and the line (from 1) of each key in it where known."""

    name: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    part: KeyPath = ()
    """Where in it the paths begin: a part of a space that has two."""

    def below(self, key: str) -> Source:
        """The same for what stands under `key`."""
        return replace(self, part=(*self.part, key))

    def where(self, *path: str | int) -> str:
        """`probe.yaml, line 12, parameters.lr.low`."""
        path = (*self.part, *path)
        known = next((p for p in _prefixes(path) if p in self.lines), None)
        line = f", line {self.lines[known]}" if known is not None else ""
        return f"{self.name}{line}" + (f", {dotted(path)}" if path else "")

    def error(self, problem: str, *path: str | int, hint: str | None = None) -> InputError:
        """An InputError about the setting at `path`."""
        return InputError(problem, where=self.where(*path), hint=hint)

    def unknown(
        self, kind: str, name: object, valid: Iterable[str], *path: str | int
    ) -> InputError:
        """An InputError about a name that is not among `valid`, with the closest of them first."""
        names = sorted(valid)
        close = difflib.get_close_matches(str(name), names, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        return self.error(
            f"unknown {kind} {name!r}",
            *path,
            hint=f"{guess}valid: {', '.join(names)}" if names else f"it has no {kind}s",
        )


def dotted(path: KeyPath) -> str:
    """`("parameters", "lr", 0, "low")` -> `parameters.lr[0].low`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _prefixes(path: KeyPath) -> Iterable[KeyPath]:
    return (path[:end] for end in range(len(path), 0, -1))


def read_yaml(path: Path) -> tuple[dict[str, Any], Source]:
    """The mapping in a YAML file, with the lines of its keys.

    Raises InputError for a file that cannot be read, is not YAML, or is not a mapping of names.
    """
    source = Source(name=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise source.error(f"cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise source.error("it is not UTF-8 text", hint="save it as UTF-8") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _note_lines(node, (), lines, source, ())
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise InputError(f"it is not valid YAML: {reason}", where=f"{path}{line}") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise source.error(
            "a search space is a mapping, but this file holds "
            + ("nothing" if values is None else f"a {type(values).__name__}"),
            hint="start with `parameters:`; `tuner space show demo` prints an example",
        )
    return values, Source(name=str(path), lines=lines)


def validated(model: type[_Model], values: Any, source: Source, *path: str | int) -> _Model:
    """`values` as a pydantic model, or InputError for the first mistake, unknown keys first."""
    if not isinstance(values, dict):
        valid = ", ".join(model.model_fields)
        raise source.error(f"expected a mapping, but got {values!r}", *path, hint=f"valid: {valid}")
    for key in values:
        if key not in model.model_fields:
            raise source.unknown("key", key, model.model_fields, *path, key)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise source.error(f"{first['loc'][-1]} is missing", *path) from error
        rule = first["msg"][0].lower() + first["msg"][1:].replace("dictionary", "mapping")
        problem = f"{rule}, but got {first['input']!r}"
        raise source.error(problem, *path, *first["loc"]) from error


class _Loader(yaml.SafeLoader):
    """Plain data only, with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
# PyYAML reads 010 as octal 8; YAML 1.2 and people read ten.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _note_lines(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    source: Source,
    ancestors: tuple[yaml.Node, ...],
) -> None:
    """Record the line of every key and item below `node`."""
    if any(node is ancestor for ancestor in ancestors):
        raise source.error("an anchor refers to itself", *path)
    below = (*ancestors, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _note_lines(item, (*path, index), lines, source, below)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                shown = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise InputError(
                    f"a key must be a name, but this one is {shown}",
                    where=f"{source.name}, line {line}",
                )
            here = (*path, key.value)
            if here in lines and key.tag != "tag:yaml.org,2002:merge":
                raise InputError(
                    f"{dotted(here)} is given twice, first in line {lines[here]}",
                    where=f"{source.name}, line {line}",
                )
            lines[here] = line
            _note_lines(value, here, lines, source, below)
