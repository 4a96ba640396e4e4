"""Settings are read anew when somebody says so or a file of theirs changes; what is bad changes nothing and is told."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from config import Difference, Settings, diff
from configuration.file_watch import FileWatch
from errors import BadRequest, ConfigError
from instance_manager import InstanceManager

log = logging.getLogger("vllm_server")

EVERY_S = 1.0       # how often the files are looked at


@dataclass(frozen=True)
class Reloaded:
    """`settings`: the names of those that changed."""

    settings: tuple[str, ...]
    models: Difference

    def __str__(self) -> str:
        parts = [f"models {what}: {', '.join(ids)}" for what, ids in (
            ("added", self.models.added), ("removed", self.models.removed), ("changed", self.models.changed)) if ids]
        names = [name for name in self.settings if name != "catalog"]
        return "; ".join([f"changed: {', '.join(names) or 'nothing'}", *parts])


class Reloader:
    """Thread-safe.  `read` raises ConfigError; `use` gets what was read.  `problem`: what was wrong with the files when
    they were last read."""

    def __init__(self, read: Callable[[], Settings], manager: InstanceManager, watch: FileWatch,
                 use: Callable[[Settings], None] = lambda settings: None) -> None:
        self._read = read
        self._use = use
        self._manager = manager
        self._watch = watch
        self._reloading = threading.Lock()
        self.problem: str | None = None

    def reload(self) -> Reloaded:
        """Raises BadRequest when the files are bad; the old settings stay in force.  The log tells either."""
        with self._reloading:
            self._watch.note()
            try:
                settings = self._read()
                self._check_still_there(settings)
            except ConfigError as error:
                self.problem = str(error)
                refusal = BadRequest(f"not reloaded, the old settings stay: {error}", code="bad_config")
                log.error("%s", refusal.message)
                raise refusal from None
            self.problem = None
            models = diff(self._manager.settings.catalog, settings.catalog)
            changed = tuple(self._manager.reconfigure(settings))
            self._use(settings)
            reloaded = Reloaded(changed, models)
            log.info("settings reloaded; %s", reloaded)
            return reloaded

    def try_reload(self) -> None:
        """Nobody waits for an answer."""
        with contextlib.suppress(BadRequest):
            self.reload()

    def tick(self, now: float) -> None:
        """Every EVERY_S seconds: reload when config.yaml or servers.toml has changed and is written to no more."""
        if self._watch.changed():
            self.try_reload()

    def _check_still_there(self, settings: Settings) -> None:
        """Who removes the file by mistake, or for the moment between two writes, does not mean to stop every model."""
        before = self._manager.settings.config_file
        if before is not None and settings.config_file is None:
            raise ConfigError(str(before), "is gone; one that says `models: {}` takes all models away")
        servers = self._manager.settings.servers.file
        if servers is not None and settings.servers.file is None:
            raise ConfigError(str(servers), "is gone; an empty one takes all servers away")
