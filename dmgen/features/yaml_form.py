"""The YAML form of a call of a feature family."""

from __future__ import annotations

from typing import Any


def yaml_form(family: str, **arguments: Any) -> dict[str, Any]:
    """Return `{family: argument}`, or `{family: {name: argument, ...}}` for more than the first.

    Args:
        family: name of the function.
        arguments: its arguments, the first parameter first; None and False are left out as the
            defaults.
    """
    first = next(iter(arguments))
    kept = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
        if value is not None and value is not False
    }
    return {family: kept if kept.keys() - {first} else kept.get(first)}
