"""What sections of a configuration check their values with; each raises ConfigError naming the key."""

import sys
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mbpa_lm.errors import ConfigError

Value = TypeVar("Value")


LARGEST = 10**12
"""A whole number beyond it is a slip of the finger, and more than PyTorch, NumPy and C take."""


def require(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; it must be {expected}")


def known(key: str, value: Value | None) -> Value:
    """Return a value that a configuration may leave open, but that is needed now; `scales.fill_in` fills them in."""
    if value is None:
        raise ConfigError(f"{key} is empty; give it a value")
    return value


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or 0 < value <= _most(value), _within("greater than 0", value))


def require_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or 0 <= value <= _most(value), _within("0 or more", value))


def require_at_most(most: int, section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or value <= most, f"at most {most:,}")


def _most(value: float) -> float:
    return LARGEST if isinstance(value, int) else sys.float_info.max


def _within(lower: str, value: float | None) -> str:
    if value is None or not value > _most(value):
        return lower
    return f"at most {LARGEST:,}" if isinstance(value, int) else "a finite number"


def require_probability(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or 0 <= value < 1, "at least 0 and less than 1")


def check_types(section: type, values: dict[str, Any]) -> None:
    """Check values that no parser has seen against the fields of a section of the configuration."""
    hints = get_type_hints(section)
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
            wanted = f"one of {', '.join(map(str, choices))}" if choices else f"of type {_spelt(hints[name])}"
            require(name, value, False, wanted)


def _is_of(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spelt(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
