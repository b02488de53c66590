"""Files of tensors, for others to read too."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with the rights of any new file: the library itself gives them to the owner alone.

    Raises OSError or SafetensorError where they cannot be written.
    """
    path.touch()
    rights = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    path.chmod(rights)
