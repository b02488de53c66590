"""Calls to a Milvus server: repeated while it cannot be reached, one at a time where it is Milvus Lite.

Milvus Lite is a server within this process. While it moves written entries to its files, a search at the same moment would
miss them: its calls take turns.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.remote.settings import PASSWORD, TOKEN, USER, RemoteSettings, check_settings, token_from_environment

Answer = TypeVar("Answer")
CONNECT_FAILED = 2
"""Milvus's code for a server that is not there."""
INSTALL = 'pip install "mbpa_lm[remote]"'
NOISY_LOGGERS = ("pymilvus", "pymilvus.milvus_client", "milvus_lite.adapter")
"""They print a traceback for every call that fails, besides raising it."""


class Connection:
    """A client of the server, whose calls are repeated while the server is away."""

    def __init__(self, settings: RemoteSettings) -> None:
        """Connect; raises ConfigError for impossible settings, DatastoreError where there is no server, or it refuses."""
        check_settings(settings)
        self._settings, self._token = settings, "" if settings.is_file else token_from_environment()
        self.pymilvus, self._grpc = _libraries()
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._client: Any = None
        self._closed = False
        self._lite = _start_lite(settings.address) if settings.is_file else None
        try:
            version = self.call("connecting", lambda client, again: client.get_server_version())
        except BaseException:
            self.close()
            raise
        self.is_lite = "lite" in version.lower()
        if self.is_lite:
            self._turn = threading.Lock()

    def call(self, what: str, ask: Callable[[Any, bool], Answer]) -> Answer:
        """Return what `ask` returns.

        Args: what is done, for errors; ask(client, again): again, whether it has been tried before. Raises DatastoreError where
        the server stays away, or refuses.
        """
        attempt, wait_s, begin = 1, self._settings.wait_s, time.monotonic()
        while True:
            try:
                with self._turn:
                    return ask(self._connected(), attempt > 1)
            except (self.pymilvus.MilvusException, self._grpc.RpcError) as error:
                status = self._status(error)
                if status not in self._away():
                    raise self._refused(what, error, status) from None
                if attempt == self._settings.attempts:
                    raise DatastoreError(
                        f"{self._settings.address} could not be reached: {what} was tried {attempt} times within "
                        f"{time.monotonic() - begin:.1f} s; start Milvus there, or name another address"
                    ) from None
            time.sleep(wait_s)
            attempt, wait_s = attempt + 1, 2 * wait_s

    def close(self) -> None:
        """Give up the connection, and calls that wait for an answer; with it Milvus Lite, and let others open its file."""
        self._closed = True
        if self._client is not None:
            self._client.close()
        with self._turn:
            if self._lite is not None:
                self._lite.close()
            self._lite = None

    def check_open(self) -> None:
        """Raise DatastoreError where the connection was given up."""
        if self._closed:
            raise DatastoreError(f"{self._settings.place} is closed; open the memory again")

    def _connected(self) -> Any:
        self.check_open()
        if self._client is None:
            address = self._settings.address if self._lite is None else self._lite.address
            self._client = self.pymilvus.MilvusClient(
                address, token=self._token, timeout=self._settings.timeout_s, dedicated=True
            )
        return self._client

    def _away(self) -> tuple[Any, ...]:
        return CONNECT_FAILED, self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED

    def _status(self, error: Exception) -> Any:
        """Return the code of an error, that of its cause where it comes from further down."""
        cause = error if isinstance(error, self._grpc.RpcError) else error.__cause__
        return cause.code() if isinstance(cause, self._grpc.RpcError) else error.code  # type: ignore[attr-defined]

    def _refused(self, what: str, error: Exception, status: Any) -> DatastoreError:
        codes = self._grpc.StatusCode
        if status in (codes.UNAUTHENTICATED, codes.PERMISSION_DENIED):
            return DatastoreError(
                f"{self._settings.address} refused {what}: not authenticated; set {TOKEN}, or {USER} and {PASSWORD}, to what "
                f"this server knows"
            )
        said = reason(Exception(getattr(error, "message", None) or str(error)))
        for secret in filter(None, (self._token, self._token.partition(":")[2])):
            said = said.replace(secret, "***")
        return DatastoreError(f"{what} failed in {self._settings.place}: {said}")


@dataclass(frozen=True)
class LiteServer:
    """Milvus Lite over one file, in this process."""

    server: Any
    database: Any
    port: int

    @property
    def address(self) -> str:
        """Return where its client finds it."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop it; everything that it has acknowledged is in its files then."""
        self.server.stop(grace=None).wait()
        self.database.close()


def _libraries() -> tuple[Any, Any]:
    """Return pymilvus and grpc, quietened; raises DatastoreError where they are not installed."""
    try:
        import grpc
        import pymilvus
    except ImportError as error:
        raise DatastoreError(f"a memory on Milvus needs {error.name}, which is not installed; {INSTALL}") from None
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus, grpc


def _start_lite(file: str) -> LiteServer:
    """Open a file with Milvus Lite, or make it; raises DatastoreError where that cannot be."""
    try:
        from milvus_lite.adapter.grpc.server import start_server_in_thread
        from milvus_lite.exceptions import DataDirLockedError, MilvusLiteError
    except ImportError as error:
        raise DatastoreError(f"Milvus Lite needs {error.name}, which is not installed; {INSTALL}") from None
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        return LiteServer(*start_server_in_thread(file))
    except DataDirLockedError:
        raise DatastoreError(f"{file} is open already, here or in another process; close it there first") from None
    except (OSError, MilvusLiteError) as error:
        raise DatastoreError(f"{file} cannot be opened: {reason(error)}") from None
