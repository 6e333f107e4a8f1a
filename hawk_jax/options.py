"""Trees of frozen dataclasses as options: dotted typed overrides, plain dicts, digests, differences.  Knows no single option.

Everything here is used through `hawk_jax.config`, which holds the options themselves.
"""
import ast
import dataclasses
import difflib
import hashlib
import json
import types
import typing
from typing import Literal


class HawkError(Exception):
    """What a user can mend: one line that says what was wrong, where, and what to do.  The command line prints it and exits 2."""


class ConfigError(HawkError, ValueError):
    """A configuration that cannot be used."""


def _fits(value, kind) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args and type(value) in {type(a) for a in args}
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, float)
    return type(value) is kind


def _cast(value, kind):
    """ints where floats are expected, lists where tuples are, dicts where dataclasses are; everything else unchanged."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return next((v for a in args if _fits(v := _cast(value, a), a)), value)
    if kind is float and type(value) is int:
        return float(value)
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        return tuple(_cast(v, k) for v, k in zip(value, kinds)) if len(kinds) == len(value) else tuple(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value)
    return value


def _kind_name(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind)) if not typing.get_origin(kind) else str(kind).replace("typing.", "")


def _unknown(name: str, cls, where: str) -> ConfigError:
    names = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "there is: " + ", ".join(names)
    return ConfigError(f"unknown option {where!r}; {hint}")


def _parse(text: str, kind):
    """The value that `text` means for an option of type `kind`; a bare word needs no quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if _fits("", kind) and not isinstance(value, str) and value is not None:
        return text                     # a name such as `2024` stays text
    return _cast(value, kind)


def _assign(tree: dict, cls, path: str, text: str) -> None:
    """Sets one dotted option in a tree of `to_dict`, in place."""
    *parts, name = path.split(".")
    for part in parts:
        hints = typing.get_type_hints(cls)
        if part not in hints:
            raise _unknown(part, cls, path)
        if not dataclasses.is_dataclass(hints[part]):
            raise ConfigError(f"{path!r}: {part!r} is an option, it has no options inside")
        cls, tree = hints[part], tree[part]
    kind = typing.get_type_hints(cls).get(name)
    if kind is None:
        raise _unknown(name, cls, path)
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{path!r} is a part, not an option; its options: {', '.join(f.name for f in dataclasses.fields(kind))}")
    value = _parse(text, kind)
    if not _fits(value, kind):
        raise ConfigError(f"{path}={text}: expected {_kind_name(kind)}")
    tree[name] = value


def override(config, assignments: list[str]):
    """Applies `a.b=value` assignments at once, so that options which only fit together can be changed together.

    Raises ConfigError for an unknown path (with the nearest known one), a wrong type, or an impossible combination.
    """
    tree = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"expected option=value, got {assignment!r}")
        _assign(tree, type(config), path, text)
    return from_dict(type(config), tree)


def to_dict(config) -> dict:
    """Plain nested dict of a configuration or a part of it."""
    return dataclasses.asdict(config)


def from_dict(cls, tree: dict):
    """The inverse of `to_dict`; also takes what JSON made of it.  Unknown or ill-typed entries raise ConfigError."""
    hints, values = typing.get_type_hints(cls), {}
    for name, value in tree.items():
        if name not in hints:
            raise _unknown(name, cls, name)
        values[name] = _cast(value, hints[name])
        if not dataclasses.is_dataclass(hints[name]) and not _fits(values[name], hints[name]):
            raise ConfigError(f"{name}={value!r}: expected {_kind_name(hints[name])}")
    return cls(**values)


def digest(part) -> str:
    """16 hex digits that name the content of a configuration or of one of its parts."""
    return hashlib.sha256(json.dumps(to_dict(part), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `path: old -> new` for every leaf that differs between two dicts of `to_dict`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif json.dumps(a) != json.dumps(b):
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
