"""What the servers of these benchmarks share: features, requests, and a folder for their settings and logs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.awake import kept_awake
from bench.processes import ServerProcess, server_process
from bench.test_bed import CONFIG, SEED, check_environment, fill_store, without_surfaces
from loadtest.workload import Workload
from server.config import ServerConfig
from server.config_sources import load_config

#: Pins in the store: more than the largest request has candidates.
_PINS = 6_000


@dataclass(frozen=True, slots=True)
class Place:
    """A filled feature store, and where servers that read it are started.

    Attributes:
        folder: for settings, logs and whatever else a benchmark writes; removed at the end.
        config: the settings from which all servers start.
        settings: the same, read.
        feature_store: URL of the store.
        user_ids, pin_ids: uint64, the ids in it.
    """

    folder: Path
    config: Path
    settings: ServerConfig
    feature_store: str
    user_ids: np.ndarray
    pin_ids: np.ndarray

    def requests(self, candidates: int, count: int = 256) -> tuple[bytes, ...]:
        """Return different serialised requests."""
        return tuple(Workload(self.user_ids, self.pin_ids, ((candidates, 1.0),), seed=SEED).requests(count))

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @contextmanager
    def server(
        self, name: str, settings: Mapping[str, Any] | None = None, tables: str = "", **how: Any
    ) -> Iterator[ServerProcess]:
        """Run a server, and stop it afterwards.

        Args:
            name: of its files.
            settings: its settings beside those of `config`; they take the place of what is there.
            tables: further settings as TOML tables.
            how: what else `server_process` takes.

        Raises:
            BenchmarkError: it does not start.
        """
        changed = {"model_store": str(Path(self.settings.model_store).absolute()), **(settings or {})}
        top = without_surfaces(self.config).splitlines()
        lines = [line for line in top if line.partition("=")[0].strip() not in changed]
        # Strings, numbers and truth values look the same in JSON and TOML.
        lines += [f"{key} = {json.dumps(value)}" for key, value in changed.items()]
        own = self.folder / f"{name}.toml"
        own.write_text("\n".join([*lines, tables]))
        with server_process(own, self.feature_store, self.log(name), **how) as server:
            yield server


@contextmanager
def place(config: Path = CONFIG, feature_store: str | None = None) -> Iterator[Place]:
    """Fill a feature store, by default one of its own; remove everything at the end.

    Raises:
        BenchmarkError: the environment overrides settings of servers.
    """
    check_environment()
    with ExitStack() as stack:
        stack.enter_context(kept_awake())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-attacks-")))
        settings = load_config(config)
        url = feature_store or f"lmdb://{folder / 'features'}"
        user_ids, pin_ids = asyncio.run(fill_store(settings, url, _PINS))
        yield Place(folder, config, settings, url, user_ids, pin_ids)


def token_of(caller: str) -> str:
    """Return the token of a caller, which is valid only for servers of these benchmarks, on loopback."""
    return f"token-of-{caller}"


def callers_file(path: Path, callers: Sequence[str], settings: str = 'may = ["rank", "record", "seen"]') -> str:
    """Write a file of callers, all with the same settings; return its path."""
    tables = [
        f'[callers."{caller}"]\ntokens_sha256 = ["{hashlib.sha256(token_of(caller).encode()).hexdigest()}"]\n{settings}'
        for caller in callers
    ]
    path.write_text("\n".join(tables))
    return str(path)
