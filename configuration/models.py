"""The models of config.yaml as frozen values, and what differs between two catalogs.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any


def nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class ModelConfig:
    """One entry of `models`, checked, with the defaults filled in.

    `params` are flags of vLLM in their one spelling, checked as those of POST /instances are; they hold what the keys
    `max_model_len`, `precision` (`dtype`) and `gpus` (`tensor_parallel_size`) say.  `env` and `hf_token` stay out of
    repr: they may hold secrets.
    """

    id: str                                     # a request may name it or an alias
    model: str                                  # `model_path`: a hub name or a local folder
    aliases: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=nothing)
    env: Mapping[str, str] = field(default_factory=nothing, repr=False)     # for the engine
    gpus: int | tuple[int, ...] | None = None   # how many, or which
    memory_bytes: int | None = None             # of the whole model, spread evenly over its devices
    param_count: float | None = None            # in billions
    precision: str | None = None                # as written
    idle_timeout_s: float | None = None         # None: the default; 0: never
    stop_after_s: float | None = None           # a sleeper is stopped after so long asleep
    start_timeout_s: float | None = None        # None: the default
    preload: bool = False
    pinned: bool = False                        # never makes room for another
    priority: int = 0                           # a higher one stays longer
    sleep: int = 0                              # the level it sleeps at before it is stopped; 0: it does not
    replicas: tuple[int, int] = (1, 1)          # least, most
    hf_token: str | None = field(default=None, repr=False)          # its `api_key`

    @property
    def served_names(self) -> tuple[str, ...]:
        """What requests may call it, its id first."""
        return (self.id, *self.aliases)


@dataclass(frozen=True)
class Catalog:
    """All models of config.yaml.  No two share a name."""

    models: Mapping[str, ModelConfig] = field(default_factory=nothing)     # by id, in the file's order

    def find(self, name: str) -> ModelConfig | None:
        """By id or alias."""
        return self._by_name.get(name)

    def names(self) -> list[str]:
        """All that `find` knows, sorted."""
        return sorted(self._by_name)

    @cached_property
    def with_replicas(self) -> tuple[ModelConfig, ...]:
        """Those of which there may be more than one."""
        return tuple(model for model in self.models.values() if model.replicas[1] > 1)

    @cached_property
    def _by_name(self) -> dict[str, ModelConfig]:
        return {name: model for model in self.models.values() for name in model.served_names}


_OF_THE_DAEMON = frozenset({"idle_timeout_s", "stop_after_s", "start_timeout_s", "preload", "pinned", "priority",
                            "replicas"})
"""What only the daemon goes by: an engine that runs need not know."""


@dataclass(frozen=True)
class Difference:
    """Ids of models, in the order of their files.  `restart`: those of `changed` that need a new engine."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


def diff(old: Catalog, new: Catalog) -> Difference:
    both = [(model, new.models[id_]) for id_, model in old.models.items() if id_ in new.models]
    return Difference(
        added=tuple(id_ for id_ in new.models if id_ not in old.models),
        removed=tuple(id_ for id_ in old.models if id_ not in new.models),
        changed=tuple(after.id for before, after in both if before != after),
        restart=tuple(after.id for before, after in both if _for_engine(before) != _for_engine(after)))


def _for_engine(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name not in _OF_THE_DAEMON}
