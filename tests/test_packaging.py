"""What an installation promises."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def packages(file: str) -> dict[str, str]:
    """Names and versions that `pip install -r` would take, included files followed."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= packages(line.removeprefix("-r "))
        elif line:
            name, version = line.split("==")
            found[name.split("[")[0]] = version
    return found


def test_requirements_are_exact_and_never_hold_both_builds_of_faiss() -> None:
    for file, faiss in (("requirements.txt", "faiss-cpu"), ("requirements-gpu.txt", "faiss-gpu")):
        assert [name for name in packages(file) if name.startswith("faiss")] == [faiss]
    assert "milvus-lite" not in packages("requirements-gpu.txt")  # it brings faiss-cpu along
    assert packages("requirements.txt")["torch"] == "2.13.0"


def test_requirements_cover_the_package_s_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for dependency in [*project["dependencies"], *extras["remote"], *extras["test"]]:
        name, lowest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", dependency).groups()
        pinned = packages("requirements.txt")[name]
        assert [int(part) for part in pinned.split(".")[:2]] >= [int(part) for part in lowest.split(".")[:2]]
    assert set(project["scripts"]) == {"mbpa-train", "mbpa-evaluate", "mbpa-memory", "mbpa-lm-eval"}


def test_imports_between_folders_point_one_way_and_each_folder_says_what_it_is_for() -> None:
    package, needed = ROOT / "mbpa_lm", dict[str, set[str]]()
    for path in package.rglob("*.py"):
        folder = path.relative_to(package).with_suffix("").parts[0]
        tree = ast.parse(path.read_text())
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        inside = {name.split(".")[1] for name in names if name.startswith("mbpa_lm.")}
        needed.setdefault(folder, set()).update(inside - {folder})
        if path.name == "__init__.py":
            assert ast.get_docstring(tree), path
    TopologicalSorter(needed).prepare()  # which raises CycleError, naming the folders
    assert needed["adaptation"] == {"errors", "numerics"}
    assert needed["memory"] == {"errors", "numerics", "system"}
