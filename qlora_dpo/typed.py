"""Fields of a dataclass: held to the types they are declared with or to their defaults, and their help texts."""

import functools
import numbers
import os
import types
from collections.abc import Collection
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a dict", list: "a list"}
_STAND_FOR: dict[type, Any] = {bool: (bool, np.bool_), int: numbers.Integral, float: numbers.Real}
"""Whose instances are taken for those of a type: numpy's are too."""


@functools.cache
def _types(declared_by: type) -> dict[str, set[type]]:
    """The types that each field may have, of those that a class declares itself."""
    hints = get_type_hints(declared_by)
    return {
        name: {get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) in _UNIONS else (hint,))}
        for name, hint in hints.items()
        if name in vars(declared_by)["__annotations__"]
    }


_UNIONS = (types.UnionType, Union)


def help_of(declared_by: type, name: str) -> dict[str, Any]:
    """Metadata for a field that means the same as one of another dataclass, where its help text is written."""
    found = {field.name: field for field in fields(declared_by)}[name]
    return {"help": found.metadata["help"]}


def may_be_none(declared_by: type, name: str) -> bool:
    """Whether a field of a class may be None; one that it inherits may not."""
    return types.NoneType in _types(declared_by).get(name, ())


def without_numpy(instance: Any) -> None:
    """Make Python's own numbers of numpy's in the fields of a dataclass: no JSON file would hold them."""
    for name in instance.__dataclass_fields__:
        value = getattr(instance, name, None)
        if (plain := _plain(value)) is not value:
            setattr(instance, name, plain)


def _plain(value: Any) -> Any:
    """A value without numpy's numbers, also those in lists and dicts; the same object where it has none.

    >>> _plain({"min_lr": np.float64(0.5)}), _plain([np.int64(1), 2.0]), _plain(np.array([0.5]))
    ({'min_lr': 0.5}, [1, 2.0], [0.5])
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) not in (dict, list):
        return value
    parts = list(value.values() if isinstance(value, dict) else value)
    made = [_plain(part) for part in parts]
    if all(one is other for one, other in zip(made, parts, strict=True)):
        return value
    return dict(zip(value, made, strict=True)) if isinstance(value, dict) else made


def read_plainly(instance: Any, declared_by: type, but: Collection[str]) -> None:
    """Make numbers and None of the text that YAML and command lines leave for them (`5e-6`, `null`), and text of paths.

    Args:
        instance: Whose fields are set.
        declared_by: The class that declares them; those of its bases are left alone.
        but: Fields to leave alone.
    """
    for name, kinds in _types(declared_by).items():
        given = getattr(instance, name)
        if name in but:
            continue
        if isinstance(given, str) and kinds & {int, float}:
            setattr(instance, name, _number(given, kinds))
        elif isinstance(given, os.PathLike) and str in kinds:
            setattr(instance, name, os.fspath(given))


def _number(text: str, kinds: set[type]) -> Any:
    """What the text of a field of such types stands for; the text itself if that is nothing.

    >>> _number("5e-6", {float}), _number("12", {int, str}), _number("null", {int, types.NoneType})
    (5e-06, 12, None)
    """
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    try:
        return float(text) if float in kinds else int(text)
    except ValueError:
        return text


def check_types(instance: Any, declared_by: type, but: Collection[str]) -> None:
    """Refuse a value that is not of its field's type; `true` is no number.

    Args:
        instance: Whose fields are checked.
        declared_by: The class that declares them; those of its bases are left alone.
        but: Fields to leave alone.

    Raises:
        TypeError: For the first such value.
    """
    for name, kinds in _types(declared_by).items():
        value = getattr(instance, name)
        alike = isinstance(value, tuple(_STAND_FOR.get(kind, kind) for kind in kinds))
        if name not in but and (not alike or (isinstance(value, bool) and bool not in kinds)):
            said = " or ".join(sorted(_WORDS[kind] for kind in kinds - {types.NoneType}))
            said += " or None" if types.NoneType in kinds else ""
            raise TypeError(f"`{name}` must be {said}, got {value!r}. Write it as one.")


def refuse_changed(instance: Any, names: Collection[str], user: str) -> None:
    """Refuse options that have no effect, as what uses them is off.

    Args:
        instance: Whose fields are looked at.
        names: Of fields that must be as they are by default.
        user: What would use them, in words.

    Raises:
        ValueError: For the first that is not.
    """
    for name in names:
        default, value = instance.__dataclass_fields__[name].default, getattr(instance, name)
        if value != default:
            raise ValueError(f"`{name}` must be {default} without {user}, which uses it, got {value}. Leave it out.")
