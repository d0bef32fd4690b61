"""What samplers and pruners by name have in common: options, and errors.

A registry is a dict from a name to a record: its options (a pydantic model, which also feeds the
JSON schema) and the function that builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from core.errors import InputError

from ..spaces.source import Source, validated


class Options(BaseModel):
    """Options of a sampler or pruner; none by default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Spec(Protocol):
    """A sampler or pruner by name, with the options that differ from its defaults."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...


def check_name(what: str, name: str, registry: dict[str, Any], source: Source | None = None) -> str:
    """`name` if the registry holds it, else InputError with those it does hold."""
    if name not in registry:
        raise (source or Source(name="search space")).unknown(what, name, registry, what)
    return name


def check_options(
    what: str, spec: Spec, model: type[Options], source: Source | None = None
) -> Options:
    """The options of a spec, complete with defaults, or InputError for one that does not fit."""
    return validated(model, spec.options, source or Source(name="search space"), what)


def one_objective_only(
    what: str, name: str, registry: Mapping[str, Any], capability: str
) -> InputError:
    """For a study of several objectives; `capability`: what records have that can search it."""
    able = [other for other, kind in registry.items() if getattr(kind, capability)]
    return InputError(
        f"{name} knows one objective only",
        where=what,
        hint=f"with several objectives: {', '.join(able)}",
    )
