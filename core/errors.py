"""The one error that a person can mend.

Whoever finds a mistake in what a person handed in (a table, a picture, a space, a flag) raises
`InputError`. Entry points print it without a traceback and end with exit code 2.
"""


class InputError(ValueError):
    """A mistake in what was handed in: where it is, what is wrong, and what would be right.

    Args:
        problem: what is wrong, with the offending value.
        where: file, column, YAML key or flag at fault.
        hint: what would be right, or the next thing to type.
    """

    def __init__(self, problem: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.hint = hint
        super().__init__(problem, where, hint)

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text}\n  {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.where, self.hint))


class NoRoomError(InputError):
    """A disk is full. What was being done is right, and goes on once there is room."""


def _rebuild(
    kind: type[InputError], problem: str, where: str | None, hint: str | None
) -> InputError:
    return kind(problem, where=where, hint=hint)


def unknown_name(kind: str, name: object, valid: object, *, where: str | None = None) -> InputError:
    """The error for a name that a registry does not hold, with the names it does hold."""
    names = ", ".join(sorted(str(v) for v in valid))  # type: ignore[attr-defined]
    return InputError(f"unknown {kind} {name!r}", where=where, hint=f"valid: {names}")
