"""Local text: a folder with train.txt, valid.txt and test.txt, one text file, or a folder of text files."""

import hashlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from mbpa_lm.data.pieces import SPLITS, Piece, split_documents
from mbpa_lm.errors import DataError, reason
from mbpa_lm.system.durable import NoRegularFile, open_file

PIECE_BYTES = 1 << 20


def open_text(path: Path, pattern: str | None, valid_fraction: float, test_fraction: float) -> "SplitFiles | HeldOutText":
    """Open `path` as what it is: a folder of splits, a folder of files, or one file."""
    if not path.exists():
        raise DataError(f"data.path {path} does not exist; give a text file or a folder")
    if path.is_dir() and any((path / f"{split}.txt").exists() for split in SPLITS):
        return SplitFiles(path, pattern, path.resolve().name)
    return HeldOutText(path, pattern, valid_fraction, test_fraction)


class SplitFiles:
    """A folder with one file a split."""

    def __init__(self, folder: Path, pattern: str | None, name: str) -> None:
        self.name = name
        self._folder = folder
        self._pattern = pattern
        missing = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").is_file()]
        if missing:
            raise DataError(f"{folder} has no {', '.join(missing)}; a corpus folder holds train.txt, valid.txt and test.txt")

    def fingerprint(self, split: str) -> str:
        return _hash([self._folder / f"{split}.txt"], self._pattern or "")

    def pieces(self, split: str) -> Iterator[Piece]:
        path = self._folder / f"{split}.txt"
        yield from split_documents(read_pieces(path, 0, path.stat().st_size), self._pattern)


class HeldOutText:
    """A file, or all files under a folder; validation and test text are held out by bytes.

    One file: its last part is the test text, the part before it the validation text, cut at line ends. A folder: whole
    files are held out, in the order of a hash of their names, so that a new file moves few others.
    """

    def __init__(self, path: Path, pattern: str | None, valid_fraction: float, test_fraction: float) -> None:
        self.name = path.resolve().name
        self._path = path
        self._pattern = pattern
        self._fractions = (valid_fraction, test_fraction)
        if path.is_dir():
            files = _files_under(path)
            if len(files) < len(SPLITS):
                raise DataError(f"{path} holds {len(files)} files; name one of them, or a folder of {len(SPLITS)} or more")
            self._parts = self._hold_out_files(files)
        else:
            self._parts = self._hold_out_lines()

    def fingerprint(self, split: str) -> str:
        ranges = [f"{file.name} {begin} {end}" for file, begin, end in self._parts[split]]
        return _hash([file for file, _, _ in self._parts[split]], "\n".join([self._pattern or "", *ranges]))

    def pieces(self, split: str) -> Iterator[Piece]:
        for file, begin, end in self._parts[split]:
            yield from split_documents(read_pieces(file, begin, end), self._pattern)

    def _hold_out_files(self, files: list[Path]) -> dict[str, list[tuple[Path, int, int]]]:
        names = {file: hashlib.sha256(str(file.relative_to(self._path)).encode()).hexdigest() for file in files}
        valid, test = hold_out([(names[file], file.stat().st_size) for file in files], *self._fractions)
        parts: dict[str, list[tuple[Path, int, int]]] = {split: [] for split in SPLITS}
        for file in files:
            split = "valid" if names[file] in valid else "test" if names[file] in test else "train"
            parts[split].append((file, 0, file.stat().st_size))
        return parts

    def _hold_out_lines(self) -> dict[str, list[tuple[Path, int, int]]]:
        size = self._path.stat().st_size
        valid_fraction, test_fraction = self._fractions
        wanted = (int(size * (1 - valid_fraction - test_fraction)), int(size * (1 - test_fraction)))
        with _reading(self._path) as file:
            cuts = []
            for offset in wanted:
                file.seek(offset)
                file.readline()
                cuts.append(file.tell())
        bounds = [0, *cuts, size]
        if any(begin >= end for begin, end in zip(bounds, bounds[1:], strict=False)):
            advice = "give a longer text, or larger data.valid_fraction and data.test_fraction"
            raise DataError(f"{self._path} has too few lines to hold out validation and test text; {advice}")
        return {split: [(self._path, begin, end)] for split, begin, end in zip(SPLITS, bounds, bounds[1:], strict=False)}


class WholeText:
    """A file, or all files under a folder, as one stream: every split is the whole text."""

    def __init__(self, path: Path, pattern: str | None) -> None:
        if not path.exists():
            raise DataError(f"{path} does not exist; give a text file or a folder of text files")
        self.name = path.resolve().name
        self._pattern = pattern
        self._files = _files_under(path) if path.is_dir() else [path]
        if not self._files:
            raise DataError(f"{path} holds no files; give a text file or a folder of text files")

    def fingerprint(self, split: str) -> str:
        return _hash(self._files, self._pattern or "")

    def pieces(self, split: str) -> Iterator[Piece]:
        for file in self._files:
            yield from split_documents(read_pieces(file, 0, file.stat().st_size), self._pattern)


def hold_out(sizes: list[tuple[str, int]], valid_fraction: float, test_fraction: float) -> tuple[set[str], set[str]]:
    """Choose the names whose text is held out, in order of name, until each share of the total size is reached.

    Every one of the two sets, and what is left for training, has at least one name.
    """
    total = sum(size for _, size in sizes)
    ordered = sorted(sizes)
    chosen: list[set[str]] = []
    for fraction in (valid_fraction, test_fraction):
        names: set[str] = set()
        taken = 0
        while ordered and (not names or taken < fraction * total) and len(ordered) > 2 - len(chosen):
            name, size = ordered.pop(0)
            names.add(name)
            taken += size
        chosen.append(names)
    return chosen[0], chosen[1]


def read_pieces(path: Path, begin: int, end: int) -> Iterator[Piece]:
    """Read bytes `begin` to `end` of a UTF-8 file as pieces of whole lines; the last line is ended if it is not.

    A line longer than a piece is cut at white space. Raises DataError naming the byte that is not UTF-8.
    """
    if end - begin == 0:
        raise DataError(f"{path} is empty; there is nothing to read")
    with _reading(path) as file:
        if begin == 0 and file.read(len(BOM_UTF8)) == BOM_UTF8:
            begin = len(BOM_UTF8)
        file.seek(begin)
        offset, left, rest, starts_document = begin, end - begin, b"", True
        while left or rest:
            block = rest + file.read(min(PIECE_BYTES, left))
            left = end - file.tell()
            cut = len(block) if left <= 0 else _last_break(block)
            if cut == 0:  # no white space yet: read on
                rest = block
                continue
            text = _decode(block[:cut], path, offset)
            offset, rest = offset + cut, block[cut:]
            if left <= 0 and not text.endswith("\n"):
                text += "\n"
            yield Piece(text, starts_document)
            starts_document = False


def _files_under(folder: Path) -> list[Path]:
    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(folder).parts)

    return [file for file in sorted(folder.rglob("*")) if file.is_file() and not is_hidden(file)]


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    """Open a file; raises DataError where it cannot be read, or is a pipe or a device, which cannot be read twice."""
    try:
        with open_file(path) as file:
            yield file
    except (OSError, NoRegularFile) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None


def _last_break(block: bytes) -> int:
    """Where to cut: after the last newline, else after the last space, else 0."""
    return (block.rfind(b"\n") + 1) or (block.rfind(b" ") + 1)


def _decode(block: bytes, path: Path, offset: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, utf16 = block[error.start], offset == 0 and block.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        if utf16:
            advice = "it begins as UTF-16 does; convert it with iconv -f utf-16 -t utf-8"
        elif b"\0" in block:
            advice = "it holds zero bytes, as no text does; name a text file"
        else:
            advice = "convert it first, for example with iconv -f latin1 -t utf-8"
        raise DataError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; {advice}") from None


def _hash(paths: list[Path], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        with _reading(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
