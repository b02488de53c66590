"""Every fuzz target on some hundred inputs by chance, without atheris; `make fuzz` runs them for real."""

import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NAMES
from tests.fuzz.targets import TARGETS, prepared


def test_every_target_has_its_name() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_strangers_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    read, generator = prepared(name, tmp_path / "work"), random.Random(0)
    for _ in range(150):
        read(generator.randbytes(generator.choice((0, 1, 2, 5, 9, 40))))
