"""Penn Treebank and WikiText from the Hugging Face hub: parquet revisions, no remote code."""

from collections.abc import Iterator
from typing import NamedTuple

from mbpa_lm.data.pieces import Piece, split_documents
from mbpa_lm.errors import DataError, reason

ROWS_A_PIECE = 4096


class _Source(NamedTuple):
    repository: str
    configuration: str | None
    revision: str
    column: str


SOURCES = {
    # The original PTB repository is a loading script; the hub's own parquet conversion of it needs none.
    "ptb": _Source("ptb-text-only/ptb_text_only", "penn_treebank", "refs/convert/parquet", "sentence"),
    "wikitext-2": _Source("Salesforce/wikitext", "wikitext-2-v1", "main", "text"),
    "wikitext-103": _Source("Salesforce/wikitext", "wikitext-103-v1", "main", "text"),
}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class HubCorpus:
    """A corpus downloaded once by the `datasets` library and read from its memory-mapped files."""

    def __init__(self, name: str, pattern: str | None) -> None:
        self.name = name
        self._source = SOURCES[name]
        self._pattern = pattern
        self._loaded: dict[str, object] = {}

    def fingerprint(self, split: str) -> str:
        # `datasets` derives this from the downloaded files and every step since.
        return f"{self._dataset(split)._fingerprint}-{self._pattern or ''}"

    def pieces(self, split: str) -> Iterator[Piece]:
        yield from split_documents(self._rows(split), self._pattern)

    def _rows(self, split: str) -> Iterator[Piece]:
        dataset = self._dataset(split)
        for start in range(0, len(dataset), ROWS_A_PIECE):
            rows = dataset[start : start + ROWS_A_PIECE][self._source.column]
            # A row is a line; some revisions keep its newline.
            yield Piece("".join(row.rstrip("\n") + "\n" for row in rows), start == 0)

    def _dataset(self, split: str):  # type: ignore[no-untyped-def]  # datasets.Dataset, imported where it is needed
        if split not in self._loaded:
            import datasets

            source = self._source
            try:
                self._loaded[split] = datasets.load_dataset(
                    source.repository, source.configuration, revision=source.revision, split=HUB_SPLITS[split]
                )
            except Exception as error:  # the hub's client raises many kinds; all mean that the text is not here
                raise DataError(
                    f"{self.name} could not be loaded from the hub ({reason(error)}); with no network, set data.path to a "
                    f"folder with train.txt, valid.txt and test.txt"
                ) from None
        return self._loaded[split]
