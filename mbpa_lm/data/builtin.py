"""The built-in corpus: the English documentation that every Python carries. It needs no download.

Documents are the docstrings of one standard-library module each, and one entry of `pydoc_data.topics` each. Source
files are parsed with `ast` and never imported. Words, numbers and punctuation are set apart by spaces, so that the word
tokenizer sees `os . path . join` and not one opaque word. Which documents are held out depends on a hash of their
names alone, so the splits are the same on every machine with the same Python.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mbpa_lm.data.pieces import Piece
from mbpa_lm.data.text_files import hold_out
from mbpa_lm.errors import DataError

# Tests, vendored packages and the two that are programs rather than library.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "_vendor", "_bundled"}
TOKEN = re.compile(r"[A-Za-z_][A-Za-z_0-9]*|[0-9]+|[^\sA-Za-z_0-9]")


class BuiltinCorpus:
    """Documentation of the running Python, split by document."""

    def __init__(self, valid_fraction: float, test_fraction: float) -> None:
        self.name = "builtin"
        self._fractions = (valid_fraction, test_fraction)

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256()
        for name, text in self._split(split):
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()

    def pieces(self, split: str) -> Iterator[Piece]:
        for _, text in self._split(split):
            yield Piece(text, True)

    def document_names(self, split: str) -> list[str]:
        """Names of the split's documents in the order of the stream: `asyncio.locks`, `topic:assert`."""
        return [name for name, _ in self._split(split)]

    def _split(self, split: str) -> list[tuple[str, str]]:
        hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in self._documents}
        sizes = [(hashes[name], len(text)) for name, text in self._documents.items()]
        valid, test = hold_out(sizes, *self._fractions)
        held_out = {**dict.fromkeys(valid, "valid"), **dict.fromkeys(test, "test")}
        return [item for item in self._documents.items() if held_out.get(hashes[item[0]], "train") == split]

    @cached_property
    def _documents(self) -> dict[str, str]:
        library = Path(sysconfig.get_paths()["stdlib"])
        documents = dict(_module_documents(library)) | dict(_topic_documents(library))
        if not documents:
            raise DataError(f"this Python has no standard-library sources under {library}; use data.corpus text")
        return documents


def _module_documents(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0] == "pydoc_data" or parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and deliberately broken files
        lines = [line for docstring in _docstrings(tree) for line in _tokenized_lines(docstring)]
        if lines:
            yield ".".join(parts)[: -len(".py")], "\n".join(lines) + "\n"


def _topic_documents(library: Path) -> Iterator[tuple[str, str]]:
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"topic:{key.value!s}", "\n".join(_tokenized_lines(value.value)) + "\n"


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, in the order of the source."""
    nodes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring


def _tokenized_lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        tokens = TOKEN.findall(line)
        if tokens:
            yield " ".join(tokens)
