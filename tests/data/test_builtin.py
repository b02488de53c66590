import sys

import pytest

from mbpa_lm.data.builtin import BuiltinCorpus
from mbpa_lm.data.pieces import SPLITS


@pytest.fixture(scope="module")
def builtin() -> BuiltinCorpus:
    return BuiltinCorpus(0.05, 0.05)


def test_it_is_the_documentation_that_python_carries(builtin: BuiltinCorpus) -> None:
    names = {split: builtin.document_names(split) for split in SPLITS}
    everything = [name for split in SPLITS for name in names[split]]
    assert len(everything) == len(set(everything))
    assert {"argparse", "asyncio.locks", "topic:assert"} <= set(everything)
    assert not any(name.startswith(("test.", "idlelib.", "pydoc_data")) for name in everything)
    tokens = {split: sum(len(piece.text.split()) for piece in builtin.pieces(split)) for split in SPLITS}
    total = sum(tokens.values())
    assert 350_000 < total < 800_000
    for split in ("valid", "test"):
        assert 0.04 * total < tokens[split] < 0.09 * total


def test_every_document_is_one_piece(builtin: BuiltinCorpus) -> None:
    pieces = list(builtin.pieces("test"))
    assert len(pieces) == len(builtin.document_names("test"))
    assert all(piece.starts_document and piece.text.endswith("\n") for piece in pieces)


def test_modules_are_never_imported(builtin: BuiltinCorpus) -> None:
    assert "antigravity" in {name for split in SPLITS for name in builtin.document_names(split)} or sys.version_info >= (3, 14)
    assert "antigravity" not in sys.modules
    assert "pydoc_data.topics" not in sys.modules


def test_the_fingerprint_is_of_the_text(builtin: BuiltinCorpus) -> None:
    fingerprints = [builtin.fingerprint(split) for split in SPLITS]
    assert len(set(fingerprints)) == 3
    assert fingerprints == [builtin.fingerprint(split) for split in SPLITS]
