from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.memory.milvus import LiteServer


@pytest.fixture
def server(tmp_path: Path) -> "Iterator[LiteServer]":
    """A server over the file that `opened` opens in the test's folder; the two cannot be open at once."""
    from tests.memory.milvus import LiteServer  # which skips where Milvus Lite is not there

    running = LiteServer(tmp_path / "m.db")
    running.start()
    yield running
    running.stop()
