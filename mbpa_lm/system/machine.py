"""What this computer is, and how to use it well. Knows nothing of language models."""

import contextlib
import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

CODE = ("mbpa_lm", "configs", "train.py", "evaluate.py")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's mallopt, from malloc.h."""


def pick_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for on this machine."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def keep_freed_memory() -> None:
    """Ask the C library to keep freed blocks for the next tensor instead of handing them back to the kernel.

    Without it every tensor of some megabytes is mapped, zeroed page by page and unmapped again: on two cores that
    was a third of an LSTM's training step. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(M_TOP_PAD, 256 << 20)


def return_freed_memory() -> None:
    """Ask the C library to hand every freed tensor of a mebibyte or more back to the kernel at once.

    By itself it does so at first, and then keeps what is as large as something that was freed before.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
        mallopt(M_ARENA_MAX, 2)


def compute_repeatably(device: str) -> None:
    """Have CUDA add in a fixed order, which is slower, where `device` (auto, cpu or cuda) is or stands for one.

    To be called before anything is computed there. What has no such order says so itself, in a warning.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def bfloat16_is_faster(device: torch.device, size: int = 1024, repeats: int = 3) -> bool:
    """Measure whether matrix products are at least 1.5 times as fast in bfloat16 as in float32 here."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def seconds(dtype: torch.dtype) -> float:
        left = torch.ones(size, size, dtype=dtype, device=device)
        left @ left  # the first product also sets the library up
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ left
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)


def release_freed_memory() -> None:
    """Have the C library give freed memory back to the system, where it can be told to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Return the memory of this process that is resident now; its peak so far where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes() -> int:
    """Return the most memory that tensors of this process have had on the CUDA device; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def describe_machine(device: torch.device) -> str:
    """Return one line about the processor and accelerator that a result was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    processors = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, {processors}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def code_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, `-dirty` where its code differs; None elsewhere."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()
