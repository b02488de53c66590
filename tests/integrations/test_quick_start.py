"""The README's quick start, as a newcomer pastes it."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_a_model_without_any_training_says_what_is_in_its_memory(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=README.parent, capture_output=True, text=True, timeout=300, check=True
    )
    assert "The new pump is called Aquila. It was built in Trondheim" in found.stdout
