"""The same search through FAISS: on a GPU, tensors stay where they are (knn_gpu); on a CPU it is what tests compare with.

FAISS knows of no stretches: it searches the keys that all queries see, and the few that only some see are measured directly.

Dimensions: `C` queries, `K` neighbours, `N` keys, `n` candidates, `d` hidden size.
"""

import functools
import subprocess
import sys
import warnings
from typing import Any

import faiss
import torch
from torch import Tensor

from mbpa_lm.memory.nearest_plain import ROUNDING, SPARE_CANDIDATES, Search, choose, measure_all

ONE_SEARCH = """
import faiss, numpy
resources, keys = faiss.StandardGpuResources(), numpy.zeros((8, 4), dtype=numpy.float32)
resources.noTempMemory()
faiss.knn_gpu(resources, keys, keys, 1)
"""


def nearest_faiss(search: Search, count: int) -> tuple[Tensor, Tensor]:
    """Do what `nearest.nearest` does, for single precision."""
    keys_Nd, queries_Cd = search.keys_Nd, search.queries_Cd
    knn = knn_on_gpu if keys_Nd.is_cuda else knn_on_cpu
    first, last = int(search.begins_C.min()), int(search.ends_C.max())
    begin = int(search.begins_C.max())
    end = max(begin, int(search.ends_C.min()))
    rows_n = torch.cat([torch.arange(first, begin), torch.arange(end, last)]).to(keys_Nd.device)
    candidates_Cn = rows_n.where(search.sees(rows_n), -1)
    wanted = min(count + SPARE_CANDIDATES, end - begin)
    norms_C = queries_Cd.square().sum(1)
    farthest_C = torch.full_like(norms_C, torch.inf)
    if wanted:
        distances_Cn, found_Cn = knn(queries_Cd.contiguous(), keys_Nd[begin:end].contiguous(), wanted)
        candidates_Cn = torch.cat([candidates_Cn, found_Cn + begin], dim=1)
        farthest_C = distances_Cn[:, -1] if wanted < end - begin else farthest_C
    rows_CK, distances_CK = choose(keys_Nd, queries_Cd, candidates_Cn, count)
    allowed_C = ROUNDING[keys_Nd.dtype] * (norms_C + search.squared_norms_N.amax())
    doubtful_C = farthest_C <= distances_CK[:, -1] + allowed_C
    return measure_all(search, doubtful_C, rows_CK, distances_CK)


def knn_on_cpu(queries_Cd: Tensor, keys_Nd: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Search with `faiss.knn`."""
    distances, rows = faiss.knn(queries_Cd.numpy(), keys_Nd.numpy(), count)
    return torch.from_numpy(distances), torch.from_numpy(rows)


def knn_on_gpu(queries_Cd: Tensor, keys_Nd: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Search with `faiss.knn_gpu`, on the tensors' own device and stream."""
    import faiss.contrib.torch_utils  # it makes knn_gpu take tensors

    with torch.cuda.device(queries_Cd.device):
        found: tuple[Tensor, Tensor] = faiss.knn_gpu(_resources(queries_Cd.device.index), queries_Cd, keys_Nd, count)
    return found


@functools.cache
def has_gpu_build() -> bool:
    """Say whether FAISS was built for GPUs, sees one, and has machine code for it.

    A build without code for a GPU raises nothing there: it ends the process. So another process tries it first.
    """
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return False
    tried = subprocess.run([sys.executable, "-c", ONE_SEARCH], capture_output=True, text=True, check=False)
    if tried.returncode:
        last = tried.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        warnings.warn(
            f"this FAISS cannot run on this machine's GPU ({last[0]}), and PyTorch searches instead; install another build, as "
            f"with pip install -r requirements-gpu.txt",
            stacklevel=2,
        )
    return tried.returncode == 0


@functools.cache
def _resources(device: int) -> Any:
    return faiss.StandardGpuResources()
