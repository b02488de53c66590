import os
from pathlib import Path

import pytest

from mbpa_lm.system.durable import LONGEST_JSON, file_hash, read_json


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        for read in (read_json, file_hash):
            with pytest.raises(ValueError, match="it is no regular file"):
                read(tmp_path / name)


def test_a_json_file_of_holes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "holes.json").touch()
    os.truncate(tmp_path / "holes.json", LONGEST_JSON + 1)
    with pytest.raises(ValueError, match="is longer than 64 MiB"):
        read_json(tmp_path / "holes.json")
