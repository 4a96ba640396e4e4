"""What must hold whatever happens: looked at from outside, by HTTP, in /proc and on disk."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instances import processes
from tests.chaos.load import HANG_S, Load
from tests.chaos.world import World

GUARD_S = 90.0              # against hanging: what is promised in 5 s takes longer where nine others use the machine
STEP_S = 0.05
RUNS = ("ready", "falling_asleep", "sleeping", "waking")
ENDS = ("stopping", "backoff", "failed")


class Broken(AssertionError):
    """An invariant is."""


def settles(problem: Callable[[], str | None], what: str, guard_s: float = GUARD_S) -> float:
    """Seconds until there is no problem.  Raises Broken."""
    began = time.monotonic()
    while (found := problem()) is not None:
        if time.monotonic() - began > guard_s:
            raise Broken(f"{what}, for {guard_s:.0f} s: {found}")
        time.sleep(STEP_S)
    return time.monotonic() - began


def instances(world: World) -> list[dict[str, Any]] | None:
    """None: the daemon does not answer."""
    if world.daemon.exited():
        return None
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
        found: list[dict[str, Any]] = world.daemon.get("/instances").json["data"]
        return found
    return None


# --- the registry and what runs -------------------------------------------------------------------------------------

def disagreement(world: World) -> str | None:
    """How the registry differs from the processes that run, under load too; None: it does not."""
    before, sessions, after = instances(world), world.daemon.engine_sessions(), instances(world)
    if before is None or after is None:
        return "the daemon does not answer"
    views = [*before, *after]
    for session, owner in sessions.items():
        claims = [one for one in views if one["id"] == owner and (one["pid"] == session or one["status"] in ENDS)]
        if not claims and processes.session_members(session):
            return f"session {session} of {owner} runs, and no instance has it"
    for one in before:
        same = any((other["id"], other["pid"], other["status"]) == (one["id"], one["pid"], one["status"])
                   for other in after)
        if same and one["status"] in RUNS and one["pid"] not in sessions:
            return f"{one['id']} is {one['status']} with pid {one['pid']}, which does not run"
    return None


def double_start(world: World) -> None:
    """Never, at no time, two engines for one instance.  Raises Broken."""
    owners = Counter(world.daemon.engine_sessions().values())
    for owner, count in owners.items():
        if count > 1:
            again = [session for session, other in world.daemon.engine_sessions().items() if other == owner]
            alive = [session for session in again if any(
                not processes.is_resource_tracker(member.pid) for member in processes.session_members(session))]
            if len(alive) > 1:
                raise Broken(f"instance {owner} has two engines: {alive}")


def one_each(world: World) -> str | None:
    """A model of the catalog has one instance, and no memory in /dev/shm or record is without an owner."""
    views = instances(world)
    if views is None:
        return "the daemon does not answer"
    models = Counter(one["model_name"] for one in views if one["status"] not in ("stopping", "failed"))
    if twice := [model for model, count in models.items() if count > 1]:
        return f"{twice} have more than one instance"
    if left := {one["id"]: one["in_flight"] for one in views if one["in_flight"]}:
        return f"requests in flight, though no client asks: {left}"
    sessions = world.daemon.engine_sessions()
    if leaked := [path.name for path in world.daemon.engine_memory()
                  if path.name.split("_")[1] not in sessions.values()]:
        return f"shared memory of no engine: {leaked}"
    recorded = {one["id"]: (one["engine"] or {}).get("pid") for one in world.records()}
    if unowned := set(recorded) - {one["id"] for one in views}:
        return f"records of no instance: {unowned}"
    if wrong := {one["id"]: (one["pid"], recorded.get(one["id"])) for one in views
                 if one["status"] in RUNS and recorded.get(one["id"]) != one["pid"]}:
        return f"pids that are not on record: {wrong}"
    return None


# --- files ----------------------------------------------------------------------------------------------------------

def whole_files(world: World) -> None:
    """Every file of the state is whole at any time.  Raises Broken."""
    folder = world.state / "instances"
    for path in [*folder.glob("*.json"), world.state / "history.json"]:
        data = _read(path)
        if data is None:
            continue
        try:
            found = json.loads(data)
        except ValueError as error:
            raise Broken(f"{path.name} is not whole: {error}: {data[-80:]!r}") from None
        if path.parent == folder and found["id"] != path.stem:
            raise Broken(f"{path.name} is a record of {found['id']}")
    if unreadable := [path.name for path in world.state.rglob("*.unreadable")]:
        raise Broken(f"set aside as unreadable: {unreadable}")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:       # gone since it was listed
        return None


# --- all together ---------------------------------------------------------------------------------------------------

def at_rest(world: World, load: Load) -> None:
    """Nobody asks any more: every request ends, every lease comes back, registry and disk say what is.  Raises
    Broken."""
    settles(lambda: "; ".join(map(str, load.in_flight())) or None, "requests never end", HANG_S + 30)
    settles(lambda: one_each(world), "it does not come to rest")
    settles(lambda: disagreement(world), "the registry is wrong at rest")
    whole_files(world)
    double_start(world)
    for one in world.bystanders:
        if one.poll() is not None:
            raise Broken(f"the bystander {one.pid} was killed")
