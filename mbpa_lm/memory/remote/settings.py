"""Where a memory on Milvus is, how patiently it is used, and who may use it.

Passwords and tokens come from the environment and from nowhere else, so that no configuration, log or run folder holds one.
"""

import os
from dataclasses import dataclass
from typing import Literal

from mbpa_lm.errors import ConfigError

TOKEN, USER, PASSWORD = "MBPA_MILVUS_TOKEN", "MBPA_MILVUS_USER", "MBPA_MILVUS_PASSWORD"
LITE_ENDING = ".db"
Index = Literal["FLAT", "HNSW", "AUTOINDEX"]


@dataclass(frozen=True)
class RemoteSettings:
    """A collection of a Milvus server, and the patience with which it is written and searched."""

    address: str
    """A file that ends in .db, for Milvus Lite in this process, or http(s)://host:port of a cluster"""
    collection: str = "mbpa_lm"
    """The collection's name; it is made if it is not there"""
    index: Index = "FLAT"
    """How a cluster searches a collection that is made now: exactly, or approximately; Milvus Lite searches exactly"""
    batch: int = 512
    """Entries a write"""
    queued: int = 4
    """Batches that may wait to be written; more than these, and adding waits"""
    attempts: int = 5
    """How often a call is tried while the server cannot be reached"""
    wait_s: float = 1.0
    """Seconds before the second attempt; twice as many before each further one"""
    timeout_s: float = 30.0
    """Seconds that one attempt may take"""

    @property
    def is_file(self) -> bool:
        """Say whether the database is a file of this machine."""
        return self.address.endswith(LITE_ENDING)

    @property
    def place(self) -> str:
        """Return how errors name the collection."""
        return f"collection {self.collection} at {self.address}"


def check_settings(settings: RemoteSettings) -> None:
    """Raise ConfigError where the settings are impossible; what is no address is not shown, it might hold a password."""
    if not settings.is_file and not settings.address.startswith(("http://", "https://")):
        raise ConfigError("the address of a Milvus memory must be a file that ends in .db, or http(s)://host:port")
    if "@" in settings.address and not settings.is_file:
        raise ConfigError(
            f"the address of a Milvus memory must hold no user or password; set {TOKEN}, or {USER} and {PASSWORD}"
        )
    if settings.is_file and settings.index != "FLAT":
        raise ConfigError(f"Milvus Lite searches exactly: index must be FLAT for {settings.address}, not {settings.index}")
    for name in ("batch", "queued", "attempts"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}")


def token_from_environment() -> str:
    """Return what authenticates at the server, empty if nothing is set; raises ConfigError where half of it is."""
    token, user, password = (os.environ.get(name, "") for name in (TOKEN, USER, PASSWORD))
    if not token and bool(user) != bool(password):
        given, missing = (USER, PASSWORD) if user else (PASSWORD, USER)
        raise ConfigError(f"{given} is set and {missing} is not; set both, or {TOKEN}")
    return token or (f"{user}:{password}" if user else "")
