"""Plain data -> dataclasses, by the types that their fields declare, and back: plans, results, notes. By msgspec."""

from __future__ import annotations

from typing import Any, TypeVar

Kind = TypeVar("Kind")


def encode(value: object) -> Any:
    """dataclasses.asdict for JSON, twenty times faster; other values are not copied."""
    import msgspec

    return msgspec.to_builtins(value)


def decode(data: object, kind: type[Kind]) -> Kind:
    """What `json.dumps(encode(value))` made of a value, read with parse_json -> an equal value.

    Lists become tuples, also for the declared type Any: a value that survives JSON holds no list.

    Raises:
        ValueError: with the place: "Expected `float`, got `str` - at `$.models[0].seconds`".
    """
    import msgspec  # here: `merge --help` does without

    try:
        return msgspec.convert(_tuples(data), kind, dec_hook=_variant)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _variant(kind: Any, data: object) -> object:
    """The one of several dataclasses that `kind.variant` chooses from the data."""
    import msgspec

    return msgspec.convert(data, kind.variant(data), dec_hook=_variant)


def _tuples(data: object) -> object:
    if isinstance(data, list):
        return tuple(_tuples(item) for item in data)
    if isinstance(data, dict):
        return {name: _tuples(item) for name, item in data.items()}
    return data
