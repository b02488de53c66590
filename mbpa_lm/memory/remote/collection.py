"""The entries as rows of one Milvus collection: made or checked when it is opened, then written and searched.

Whose hidden states the keys are, and the shape of an entry, stand in the collection's properties and, since not every server
keeps those, in its description too. (Milvus Lite keeps no description.)

Dimensions: `C` queries, `n` candidates a query, `N` entries, `d` hidden size.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.manifest import Identity, Layout, check_identity
from mbpa_lm.memory.remote.connection import Connection
from mbpa_lm.memory.remote.rows import (
    DOCUMENT,
    KEY,
    LIKELY_PROBABILITIES,
    LIKELY_WORDS,
    LOG_PARTITION,
    POSITION,
    VALUE,
    Row,
    from_rows,
    output_fields,
    to_rows,
)
from mbpa_lm.memory.remote.settings import RemoteSettings

FORMAT = 1
PROPERTY = "mbpa_lm"
LOADED_WITHIN_S = 600
CONSISTENCY = "Strong"
"""A search sees every write that was acknowledged before it."""
HNSW_EFFORT = 128
"""Candidates that a search through a graph keeps, at least."""
INDEX_PARAMETERS: dict[str, dict[str, int]] = {"FLAT": {}, "AUTOINDEX": {}, "HNSW": {"M": 16, "efConstruction": 200}}
MOST_CANDIDATES = 16_384
"""Milvus gives no query more."""
CANDIDATES_AT_ONCE = 16_384
QUERIES_AT_ONCE = 64
LITE_NUMBERS_AT_ONCE = 1 << 24
"""Milvus Lite subtracts every query from every key before it squares and sums: it needs three times as many, 192 MiB."""


@dataclass(frozen=True)
class Candidates:
    """What the server found nearest to each query, among so many entries of which each is given once, oldest first."""

    rows_Cn: Tensor  # which of the entries, -1 where there are fewer
    entries: Entries
    positions_N: Tensor


class Collection:
    """One memory on a server."""

    def __init__(self, connection: Connection, settings: RemoteSettings, identity: Identity, layout: Layout) -> None:
        """Open it, or make it; raises DatastoreError where it is of another model, tokenizer or layout, or damaged."""
        self._connection, self._settings, self._layout = connection, settings, layout
        types = connection.pymilvus.DataType
        if not self._ask("opening", "has_collection"):
            half = layout.key_type == "float16" and not connection.is_lite
            self._make(identity, types.FLOAT16_VECTOR if half else types.FLOAT_VECTOR)
        described = self._ask("opening", "describe_collection")
        check_record(settings.place, described, identity, layout)
        self._half = any(field["type"] == types.FLOAT16_VECTOR for field in described["fields"])
        if not self._ask("opening", "list_indexes"):
            self._make_index()
        self._ask("opening", "load_collection", timeout=LOADED_WITHIN_S)
        self._index = self._ask("opening", "describe_index", index_name=KEY)["index_type"]

    def count(self) -> int:
        """Return how many entries there are; raises DatastoreError where they are not the first so many, each once."""
        count = self._count_where("")
        if count != self._count_where(f"{POSITION} < {count}"):
            raise DatastoreError(
                f"{self._settings.place} is damaged: it holds {count:,} entries, but not the first {count:,}; two may have "
                f"written it at once; build it again"
            )
        return count

    def write(self, first: int, entries: Entries, documents_N: Tensor) -> None:
        """Write entries at the positions from `first` on; what an attempt before has written already is replaced.

        Raises DatastoreError where they cannot be written.
        """
        rows = to_rows(first, entries, documents_N, self._half)

        def send(client: Any, again: bool) -> None:
            write = client.upsert if again else client.insert
            write(self._settings.collection, rows, timeout=self._settings.timeout_s)

        try:
            self._connection.call("writing", send)
            if self._connection.is_lite:
                self._ask("writing", "flush")  # Milvus Lite searches what it has not put into its files far more slowly
        except DatastoreError as error:
            raise DatastoreError(
                f"{error}; the {first:,} entries before are written: open the memory again and add those after them"
            ) from None

    def queries_at_once(self, limit: int, before: int) -> int:
        """Return how many queries a search may have, for so many candidates each among so many entries."""
        most = max(1, min(QUERIES_AT_ONCE, CANDIDATES_AT_ONCE // limit))
        numbers = max(1, before * self._layout.hidden_size)
        return max(1, min(most, LITE_NUMBERS_AT_ONCE // numbers)) if self._connection.is_lite else most

    def search(self, queries_Cd: Tensor, limit: int, before: int) -> Candidates:
        """Return the entries nearest to each query among the first `before`, `limit` of them at most, in any order."""
        queries = queries_Cd.numpy().astype(np.float16 if self._half else np.float32)
        found = self._ask(
            "searching",
            "search",
            data=list(queries),
            anns_field=KEY,
            filter=f"{POSITION} < {before}",
            limit=limit,
            output_fields=output_fields(self._layout),
            search_params={"params": {"ef": max(HNSW_EFFORT, 2 * limit)} if self._index == "HNSW" else {}},
            consistency_level=CONSISTENCY,
        )
        rows: dict[int, Row] = {hit[POSITION]: hit["entity"] for hits in found for hit in hits}
        positions = sorted(rows)
        place = {position: row for row, position in enumerate(positions)}
        rows_Cn = torch.full((len(queries), limit), -1)
        for query, hits in enumerate(found):
            rows_Cn[query, : len(hits)] = torch.tensor([place[hit[POSITION]] for hit in hits], dtype=torch.int64)
        entries = from_rows([rows[position] for position in positions], self._layout)
        return Candidates(rows_Cn, entries, torch.tensor(positions, dtype=torch.int64))

    def _ask(self, what: str, method: str, **arguments: Any) -> Any:
        """Return what a method of the client returns for this collection."""
        arguments = {"timeout": self._settings.timeout_s, **arguments}
        return self._connection.call(
            what, lambda client, again: getattr(client, method)(self._settings.collection, **arguments)
        )

    def _count_where(self, expression: str) -> int:
        counted = self._ask("opening", "query", filter=expression, output_fields=["count(*)"], consistency_level=CONSISTENCY)
        return int(counted[0]["count(*)"])

    def _make(self, identity: Identity, key_type: Any) -> None:
        """Make an empty collection."""
        types = self._connection.pymilvus.DataType
        record = json.dumps(
            {"format": FORMAT, "identity": dataclasses.asdict(identity), "layout": dataclasses.asdict(self._layout)}
        )
        schema = self._connection.pymilvus.MilvusClient.create_schema(
            auto_id=False, enable_dynamic_field=False, description=record
        )
        schema.add_field(POSITION, types.INT64, is_primary=True)
        schema.add_field(KEY, key_type, dim=self._layout.hidden_size)
        schema.add_field(VALUE, types.INT64)
        schema.add_field(DOCUMENT, types.INT64)
        schema.add_field(LOG_PARTITION, types.FLOAT)
        if self._layout.likely_words:
            capacity = self._layout.likely_words
            schema.add_field(LIKELY_WORDS, types.ARRAY, element_type=types.INT32, max_capacity=capacity)
            schema.add_field(LIKELY_PROBABILITIES, types.ARRAY, element_type=types.FLOAT, max_capacity=capacity)
        properties = {PROPERTY: record}
        self._ask("making", "create_collection", schema=schema, properties=properties, consistency_level=CONSISTENCY)

    def _make_index(self) -> None:
        """Say how the empty collection is to be searched."""
        kind, index = self._settings.index, self._connection.pymilvus.MilvusClient.prepare_index_params()
        index.add_index(KEY, index_name=KEY, index_type=kind, metric_type="L2", params=INDEX_PARAMETERS[kind])
        self._ask("making", "create_index", index_params=index, sync=False)


def check_record(place: str, described: dict[str, Any], identity: Identity, layout: Layout) -> None:
    """Refuse what is no memory, and a memory of another model, tokenizer or layout, showing both."""
    try:
        record = json.loads(described.get("properties", {}).get(PROPERTY) or described["description"])
        if record["format"] != FORMAT:
            raise DatastoreError(f"{place} is a memory of format {record['format']}; this version reads format {FORMAT}")
        known, shape = Identity(**record["identity"]), Layout(**record["layout"])
    except (KeyError, TypeError, ValueError):
        raise DatastoreError(f"{place} is not a memory of mbpa_lm; name another collection") from None
    check_identity(place, known, identity, "build it again, or name another collection")
    if shape != layout:
        raise DatastoreError(
            f"the memory in {place} holds {_shape(shape)}, not {_shape(layout)}; build it again, or name another collection"
        )


def _shape(layout: Layout) -> str:
    return f"{layout.key_type} keys of {layout.hidden_size} numbers with {layout.likely_words} likely words"
