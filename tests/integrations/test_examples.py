"""The example on a folder of text files, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.tiny import folder_of
from tests.integrations.words import save_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "folder_of_texts.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_half_of_a_folder_is_remembered_and_the_other_half_scored(models: Path, tmp_path: Path) -> None:
    model = folder_of("gpt2", models)
    save_tokenizer(model)
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(["w5 w6 w7 w8 w9 w10 w11 w12"] * 10))
    arguments = ("--model", model, "--texts", tmp_path / "texts", "--memory", tmp_path / "memory")
    found = run(*arguments)
    assert found.returncode == 0, found.stderr
    assert "remembered 160 contexts of 2 files" in found.stdout
    assert "the other 2 files, 160 words" in found.stdout
    changes = [float(line.split()[-3].rstrip("%")) for line in found.stdout.splitlines() if "tokens/s" in line]
    assert len(changes) == 2
    assert max(changes) < -20
    assert (tmp_path / "memory" / "manifest.json").is_file()
    again = run(*arguments)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1] == f"error: {tmp_path / 'memory'} is there already; name another folder"


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        ({}, 3, "holds 0 texts (.txt, .md, .rst); two halves need at least 2 that say something"),
        ({"a.txt": b"", "b.md": b"words"}, 3, "holds 2 texts"),
        ({"a.txt": b"words", "b.txt": b"caf\xe9"}, 3, "b.txt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ({"a.txt": b"words", "b.rst": b"more"}, 2, "none could not be loaded: "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(texts: dict[str, bytes], code: int, message: str, tmp_path: Path) -> None:
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    found = run("--model", tmp_path / "none", "--texts", tmp_path, "--memory", tmp_path / "memory")
    assert found.returncode == code
    assert message in found.stderr.strip().splitlines()[-1]
    assert "Traceback" not in found.stderr
