"""What sections of a configuration check their values with; each raises ConfigError naming the key."""

from typing import Any, TypeVar

from mbpa_lm.errors import ConfigError

Value = TypeVar("Value")


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
        require(f"{section}.{name}", value, value is None or value > 0, "greater than 0")


def require_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or value >= 0, "0 or more")


def require_probability(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value, value is None or 0 <= value < 1, "at least 0 and less than 1")
