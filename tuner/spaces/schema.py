"""The JSON schema of search spaces, for editors: completion, and mistakes marked as they are typed.

Made from the pydantic models, the registries and the docstrings of `TrialConfig`, so that there is
no second list. The shipped copy is `search_spaces/schema.json`; a test says when it is out of date.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from core.config import (
    BATCH_NORMS,
    CLASS_WEIGHTS,
    FEATURE_NORMS,
    HEAD_STARTS,
    TrialConfig,
)

from ..goals.constraints import ConstraintsSection
from ..sampling.pruners import PRUNERS
from ..sampling.samplers import SAMPLERS
from .file import (
    FIELDS,
    NUMBERS,
    ChoiceSection,
    ConstantSection,
    FinetuneSection,
    PartSection,
    RangeSection,
    SpaceSection,
    TwoPartSection,
)

Schema = dict[str, Any]

_TYPES: dict[str, tuple[str, Schema]] = {
    "str": ("text", {"type": "string"}),
    "bool": ("boolean", {"type": "boolean"}),
    "int": ("integer", {"type": "integer"}),
    "int | None": ("integer_or_null", {"type": ["integer", "null"]}),
    "float": ("number", {"type": "number"}),
    "float | None": ("number_or_null", {"type": ["number", "null"]}),
    "tuple[int, ...]": ("widths", {"type": "array", "items": {"type": "integer", "minimum": 1}}),
}
"""Annotation of a field of `TrialConfig` -> the name and the schema of one value."""


def json_schema() -> Schema:
    """The schema (draft 2020-12) that every search space's file fits: of one part, or of two."""
    names = [name for name in FIELDS if name != "mode"]
    documentation = _documentation()
    values = {name: _value(name) for name in names}
    parameters = _closed(
        {n: {"description": documentation[n], "$ref": f"#/$defs/{_type(n)[0]}"} for n in names}
    )
    when = _closed({name: {"anyOf": [values[name], _several(values[name])]} for name in names})
    kinds = {_type(name)[0]: name for name in names}
    two_parts = _part(TwoPartSection)
    for key, model in (("probe", PartSection), ("finetune", FinetuneSection)):
        description = two_parts["properties"][key]["description"]
        two_parts["properties"][key] = {**_part(model), "description": description}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "poster-tuner search space",
        "anyOf": [_part(SpaceSection), two_parts],
        "$defs": {
            "parameters": parameters | {"required": ["backbone"]},
            "points": {"type": "array", "items": _closed(values)},
            "constraints": _untitled(ConstraintsSection.model_json_schema()),
            "sampler": _kinds_schema({n: kind.options for n, kind in SAMPLERS.items()}),
            "pruner": _kinds_schema({n: kind.options for n, kind in PRUNERS.items()}),
            "when": when,
            **{f"one_{kind}": _type(name)[1] for kind, name in kinds.items()},
            **{f"when_{kind}": _mapping(name) for kind, name in kinds.items()},
            **{kind: _parameter(name) for kind, name in kinds.items()},
        },
    }


def _part(model: type[BaseModel]) -> Schema:
    """A part of a space, or a space of one part."""
    schema = _untitled(model.model_json_schema())
    for name in ("sampler", "pruner", "parameters", "points", "constraints"):
        if name not in schema["properties"]:
            continue
        schema["properties"][name] = {
            key: value
            for key, value in schema["properties"][name].items()
            if key in ("description", "default")
        } | {"$ref": f"#/$defs/{name}"}
    return schema


def write_schema(path: Path) -> None:
    """Write the schema as the file that `# yaml-language-server: $schema=` names."""
    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")


def _type(name: str) -> tuple[str, Schema]:
    """The type that a setting shares with others, or its own if it names an entry of a list."""
    entries = _entries().get(name)
    if entries is not None:
        return name, {"type": "string", "enum": sorted(entries)}
    return _TYPES[FIELDS[name]]


def _entries() -> dict[str, Any]:
    """The settings that name an entry of a closed list."""
    from core.encoding.pooling import POOLINGS
    from core.heads import HEADS
    from core.images.views import VIEWS
    from core.losses import LOSSES
    from core.optimizers import OPTIMIZERS
    from core.schedules import SCHEDULES

    return {
        "pooling": POOLINGS,
        "views": VIEWS,
        "feature_norm": FEATURE_NORMS,
        "class_weights": CLASS_WEIGHTS,
        "head": HEADS,
        "loss": LOSSES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "batch_norm": BATCH_NORMS,
        "head_start": HEAD_STARTS,
    }


def _value(name: str) -> Schema:
    return {"$ref": f"#/$defs/one_{_type(name)[0]}"}


def _several(value: Schema) -> Schema:
    return {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}


def _parameter(name: str) -> Schema:
    """A constant, a list of choices, a mapping, or several mappings with conditions."""
    mapping = {"$ref": f"#/$defs/when_{_type(name)[0]}"}
    branches = {"type": "array", "items": mapping, "minItems": 1}
    # A bare list of widths could be one value or several, so it must be wrapped.
    scalar = [] if FIELDS[name].startswith("tuple") else [_value(name)]
    return {"anyOf": [*scalar, _several(_value(name)), mapping, branches]}


def _mapping(name: str) -> Schema:
    """A constant, choice or range, with its condition."""
    sections = [
        _section(ConstantSection, constant=_value(name)),
        _section(ChoiceSection, choice=_several(_value(name))),
    ]
    if FIELDS[name] in NUMBERS:
        number = {"type": "number" if FIELDS[name].startswith("float") else "integer"}
        sections.append(_section(RangeSection, low=number, high=number))
    return {"anyOf": sections}


def _section(model: type[BaseModel], **values: Schema) -> Schema:
    schema = _untitled(model.model_json_schema())
    for name, value in values.items():
        schema["properties"][name] = {
            "description": schema["properties"][name]["description"]
        } | value
    schema["properties"]["when"] = {"$ref": "#/$defs/when"}
    return schema


def _kinds_schema(kinds: Mapping[str, type[BaseModel]]) -> Schema:
    """A name, or a mapping with a name and that kind's options."""
    mappings = []
    for name, options in kinds.items():
        schema = _untitled(options.model_json_schema())
        schema.pop("description", None)
        schema["properties"] = {"name": {"const": name}} | schema.get("properties", {})
        mappings.append(schema | {"required": ["name"]})
    return {"anyOf": [{"enum": list(kinds)}, *mappings]}


def _closed(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _untitled(schema: Schema) -> Schema:
    """Without the titles that pydantic makes up from names."""
    properties = {
        name: {key: part for key, part in value.items() if key != "title"}
        for name, value in schema.get("properties", {}).items()
    }
    rest = {key: part for key, part in schema.items() if key not in ("title", "properties")}
    return rest | {"properties": properties}


def _documentation() -> dict[str, str]:
    """The line under each field of `TrialConfig`."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(TrialConfig))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(inspect.cleandoc(line.value.value).split())
        for field, line in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    }
