"""Searches on a CUDA device against the same on the CPU: the window, FAISS's own search, and indexes moved to the GPU."""

from pathlib import Path

import faiss
import pytest
import torch

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore.index import to_gpus, train_index
from mbpa_lm.memory.nearest_faiss import has_gpu_build, nearest_faiss
from mbpa_lm.memory.nearest_plain import Search, nearest_plain
from mbpa_lm.memory.window import WindowMemory
from tests.memory.stores import make, queries
from tests.memory.test_window import LIKELY, random_entries

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")
needs_gpu_faiss = pytest.mark.skipif(not has_gpu_build(), reason="FAISS is not built for GPUs here, or sees none")


@pytest.mark.parametrize("size", [40, 5000])
def test_the_window_finds_what_it_finds_on_the_cpu(size: int) -> None:
    stream = random_entries(700)
    stream = Entries(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in stream.tensors()))
    found = []
    for device in ("cpu", "cuda"):
        memory = WindowMemory(size, 5, LIKELY, torch.float32, torch.device(device))
        on_device = Entries(*(tensor.to(device) for tensor in stream.tensors()))
        parts = [memory.read_and_write(on_device.rows(slice(begin, begin + 90)), 8) for begin in range(0, 700, 90)]
        found.append(Neighbours.joined(parts))
    assert torch.equal(found[1].positions.cpu(), found[0].positions)
    torch.testing.assert_close(found[1].squared_distances.cpu(), found[0].squared_distances)
    assert torch.equal(found[1].entries.keys.cpu(), found[0].entries.keys)


@needs_gpu_faiss
def test_faiss_searches_tensors_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, asked = torch.randn(5000, 64, generator=generator).cuda(), torch.randn(200, 64, generator=generator).cuda()
    ends = torch.arange(4800, 5000).cuda()
    begins = ends - 4500
    search = Search(keys, keys.square().sum(1), asked, begins, ends)
    rows, distances = nearest_faiss(search, 32)
    expected_rows, expected_distances = nearest_plain(search, 32, asked @ keys.T)
    torch.testing.assert_close(distances, expected_distances)
    assert (rows == expected_rows).float().mean() > 0.999


@needs_gpu_faiss
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("gpus", ["replicate", "shard"])
def test_an_index_finds_the_same_on_gpus(kind: str, gpus: str) -> None:
    keys = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).numpy()
    index = train_index(kind, keys, 64, lambda step: None)  # type: ignore[arg-type]
    index.add(keys)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", 64)
    moved = to_gpus(index, gpus)  # type: ignore[arg-type]
    assert moved is not index
    faiss.GpuParameterSpace().set_index_parameter(moved, "nprobe", 64)
    on_cpu, on_gpu = (searched.search(keys[:100], 16)[1] for searched in (index, moved))
    shared = sum(len(set(one) & set(other)) for one, other in zip(on_cpu.tolist(), on_gpu.tolist(), strict=True))
    assert shared >= 0.97 * on_cpu.size


@needs_gpu_faiss
def test_cagra_is_built_and_searched(tmp_path: Path) -> None:
    if not hasattr(faiss, "GpuIndexCagra"):
        pytest.skip("FAISS is not built with cuVS here")
    store = make(tmp_path / "m", 12_000)
    exact = store.search(queries(), 32)
    store.build_index("cagra")
    found = store.search(queries(), 32)
    pairs = zip(exact.positions.tolist(), found.positions.tolist(), strict=True)
    assert sum(len(set(one) & set(other)) for one, other in pairs) >= 0.9 * exact.positions.numel()
