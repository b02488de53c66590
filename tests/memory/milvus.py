"""Milvus Lite for real, as a file and as a server, and entries for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.remote.settings import RemoteSettings
from mbpa_lm.memory.remote.store import RemoteStore

grpc = pytest.importorskip("grpc", reason="a memory on Milvus needs grpc")
pymilvus = pytest.importorskip("pymilvus", reason="a memory on Milvus needs pymilvus")
lite = pytest.importorskip("milvus_lite.adapter.grpc.server", reason="these tests need milvus-lite")

D, LIKELY, K = 4, 3, 5
IDENTITY, LAYOUT = Identity("a" * 64, "b" * 64), Layout(D, LIKELY)
NAME = "mbpa_lm"
SECRET = "a-very-secret-token"


def some_entries(count: int, seed: int = 0) -> Entries:
    """Entries at few places, so that distances are equal often; exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    return Entries(
        torch.randint(-3, 4, (count, D), generator=generator).float(),
        torch.randint(0, 2**31, (count,), generator=generator),
        torch.randn(count, generator=generator),
        torch.randint(0, 9, (count, LIKELY), generator=generator, dtype=torch.int32),
        torch.randint(0, 9, (count, LIKELY), generator=generator) / 16,
    )


def queries(count: int = 20) -> torch.Tensor:
    return torch.randint(-3, 4, (count, D), generator=torch.Generator().manual_seed(5)).float()


def opened(folder: Path, layout: Layout = LAYOUT, identity: Identity = IDENTITY, **settings: Any) -> RemoteStore:
    return RemoteStore(RemoteSettings(**{"address": str(folder / "m.db"), "batch": 16, **settings}), identity, layout)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    """Assert that they are equal to the bit, whatever types they come in."""
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.squared_distances, expected.squared_distances, rtol=0, atol=0)
    for one, other in zip(found.entries.tensors(), expected.entries.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, check_dtype=False)


class LiteServer:
    """Milvus Lite at a port of this machine, reached like a server elsewhere."""

    def __init__(self, file: Path) -> None:
        self._file, self._port, self._running = file, 0, False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server, self._database, self._port = lite.start_server_in_thread(str(self._file), port=self._port)
        self._running = True

    def stop(self) -> None:
        if self._running:
            self._server.stop(grace=None).wait()
            self._database.close()
            self._running = False

    def client(self) -> Any:
        return pymilvus.MilvusClient(self.address, dedicated=True)
