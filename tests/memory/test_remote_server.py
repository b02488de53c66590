"""A Milvus server that stays away, refuses, or comes back."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mbpa_lm.errors import ConfigError, DatastoreError
from mbpa_lm.memory.remote.settings import PASSWORD, TOKEN, USER
from tests.memory.milvus import NAME, SECRET, K, LiteServer, grpc, opened, queries, some_entries


def test_an_address_where_nothing_listens_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(DatastoreError, match=f"^{address} could not be reached: connecting was tried 2 times") as raised:
            opened(tmp_path, address=address, attempts=2, wait_s=0.1)
    assert 0.1 <= time.monotonic() - begin < 5
    assert SECRET not in str(raised.value)


class Deny(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Refuses every call, and repeats the credentials that came with it."""

    def service(self, details: Any) -> Any:
        def refuse(request: bytes, context: Any) -> None:
            context.abort(self.code, f"who is {SECRET}?")

        return grpc.unary_unary_rpc_method_handler(refuse)

    def __init__(self, code: Any) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("UNAUTHENTICATED", f"refused connecting: not authenticated; set {TOKEN}, or {USER} and {PASSWORD}"),
        ("INVALID_ARGUMENT", r"connecting failed in collection mbpa_lm at http"),
    ],
)
@pytest.mark.parametrize("environment", [{TOKEN: SECRET}, {USER: "someone", PASSWORD: SECRET}])
def test_a_refusal_does_not_show_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Deny(grpc.StatusCode[code])])
    address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(DatastoreError, match=message) as raised:
            opened(tmp_path, address=address, wait_s=60)  # a refusal is not tried again
        assert SECRET not in str(raised.value)
        assert "\n" not in str(raised.value)
    finally:
        server.stop(grace=None)


def test_half_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, SECRET)
    with pytest.raises(ConfigError, match=f"{PASSWORD} is set and {USER} is not; set both, or {TOKEN}"):
        opened(tmp_path, address="http://127.0.0.1:1")
    opened(tmp_path).close()  # a file needs none


def test_a_server_that_comes_back_gets_every_entry_once(tmp_path: Path, server: LiteServer) -> None:
    with opened(tmp_path, address=server.address, attempts=8, wait_s=0.1) as store:
        store.add(some_entries(32))
        store.flush()
        server.stop()
        store.add(some_entries(40, seed=1))
        time.sleep(0.2)
        server.start()
        store.flush()
        assert server.client().query(NAME, filter="", output_fields=["count(*)"])[0]["count(*)"] == 72


def test_a_write_that_fails_is_told_by_the_next_call(tmp_path: Path, server: LiteServer) -> None:
    store = opened(tmp_path, address=server.address, attempts=2, wait_s=0.05)
    store.add(some_entries(32))
    store.flush()
    server.stop()
    store.add(some_entries(20, seed=1))
    message = "could not be reached: writing was tried 2 times .* the 32 entries before are written: open the memory again"
    with pytest.raises(DatastoreError, match=message):
        store.flush()
    for call in (lambda: store.search(queries(), K), lambda: store.add(some_entries(1)), store.close):
        with pytest.raises(DatastoreError, match=message):
            call()
    server.start()
    with opened(tmp_path, address=server.address) as store:
        assert len(store) == 32


def test_a_write_that_is_refused_is_told_by_the_next_call(tmp_path: Path, server: LiteServer) -> None:
    store = opened(tmp_path, address=server.address)
    server.client().drop_collection(NAME)
    store.add(some_entries(20))
    with pytest.raises(DatastoreError, match=r"^writing failed in collection mbpa_lm at .*does not exist.*; the 0 entries"):
        store.close()
