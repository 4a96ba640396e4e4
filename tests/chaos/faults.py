"""Every kind of fault: what it does, what it undoes, and which errors a client may get of it.

A fault is a generator: it strikes, yields what it did, and undoes it when it is resumed.  Kinds that strike and are
over undo nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from instances import processes
from tests.chaos import load
from tests.chaos.schedule import Group, Plan, Shape
from tests.chaos.world import MODELS, Victim, World, config, descriptors, entry, limited
from tests.daemon import CHECKOUT, HANG_S
from tests.gpu_box import GIB, NoMemory
from tests.support import wait_until

SKIPPED = "skipped: nobody is there to be hit"

CODES: dict[str, frozenset[str]] = {
    # the daemon itself is gone, and its clients' connections with it
    "connection": frozenset({load.REFUSED, load.RESET, load.CUT}),
    # an engine is gone, before an answer or in the middle of it; the last ones are its own words
    "engine": frozenset({load.CUT, "engine_died", "engine_stopped", "engine_unreachable", "upstream_error",
                         "engine 500", "engine 503"}),
    "disk": frozenset({"state_dir", "disk_full"}),
    "processes": frozenset({"engine_not_started", "exited"}),
}
"""What clients may be told (load.py has those that are no error codes), by what is wrong."""

Strike = Callable[[World, random.Random], Generator[str, None, None]]


@dataclass(frozen=True)
class Fault:
    """`told`: what clients may be told, names of CODES and single codes.  `from_strike`: its time to recover runs from
    when it struck, and not from when it was over."""

    shape: Shape
    strike: Strike
    told: tuple[str, ...]
    from_strike: bool

    @property
    def codes(self) -> frozenset[str]:
        return frozenset().union(*(CODES.get(word, {word}) for word in self.told))

    @contextmanager
    def struck(self, world: World, plan: Plan) -> Iterator[str]:
        acting = self.strike(world, plan.random())
        yield next(acting)
        for _ in acting:
            raise AssertionError("a fault yields once")


FAULTS: dict[str, Fault] = {}


def fault(group: Group, hold_s: tuple[float, float], *told: str, from_strike: bool = False,
          ) -> Callable[[Strike], Strike]:
    def register(strike: Strike) -> Strike:
        FAULTS[strike.__name__] = Fault(Shape(group, hold_s), strike, told, from_strike)
        return strike
    return register


def shapes() -> dict[str, Shape]:
    return {kind: one.shape for kind, one in FAULTS.items()}


# --- the daemon ends ----------------------------------------------------------------------------------------------

@fault(Group.ENDS_DAEMON, (0.0, 1.0), "connection", "engine", from_strike=True)
def kill_worker(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of the process that holds the registry; its master makes another one."""
    pid = world.worker()
    if pid is None:
        yield SKIPPED
        return
    world.daemon.signal(signal.SIGKILL, pid)
    yield f"worker {pid}"


@fault(Group.ENDS_DAEMON, (0.0, 2.0), "connection", "engine")
def kill_master(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of the master: the worker ends by itself; then somebody starts the daemon again."""
    session = world.daemon.pid
    world.daemon.signal(signal.SIGKILL)
    world.daemon.wait_for_exit()
    wait_until(lambda: not processes.session_members(session))
    yield f"master {session}"
    _start(world)


@fault(Group.ENDS_DAEMON, (0.0, 2.0), "connection", "engine")
def kill_daemon(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of all of it at once, as a machine out of memory might; then somebody starts it again."""
    session = world.daemon.pid
    world.daemon.kill()
    yield f"session {session}"
    _start(world)


@fault(Group.ENDS_DAEMON, (0.0, 2.0), "connection", "engine")
def kill_daemon_and_server(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of the daemon and of an API server in one moment: what that leaves has no parent and no watcher."""
    victim = world.victim(dice, "ready", "sleeping")
    if victim is None:
        yield SKIPPED
        return
    server = processes.read_process(victim.pid)
    world.daemon.kill()
    victim.signal(signal.SIGKILL, [server] if server else [])
    yield f"the daemon, and the server of {victim.model} ({victim.pid})"
    _start(world)


@fault(Group.ENDS_DAEMON, (0.2, 1.0), "connection", "shutting_down", "engine_stopped")
def term_storm(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Many SIGTERMs, to the worker too, as systemd sends them to a whole control group: it ends once, and well."""
    to_both = dice.random() < 0.5
    targets = [pid for pid in (world.daemon.pid, world.worker() if to_both else None) if pid is not None]
    count = dice.randint(2, 20)
    for _ in range(count):
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                world.daemon.signal(signal.SIGTERM, pid)
    yield f"{count} SIGTERMs to {'master and worker' if to_both else 'the master'}"
    code = world.daemon.wait_for_exit()
    assert code == 0, f"after SIGTERM the daemon's exit code is {code}"
    assert world.daemon.engine_processes() == [], "engines are left after SIGTERM"
    assert world.daemon.records() == [], "records are left after SIGTERM"
    _start(world)


@fault(Group.ENDS_DAEMON, (0.0, 1.0), "connection", "engine")
def pid_reused(world: World, dice: random.Random) -> Generator[str, None, None]:
    """While no daemon looks, an engine dies and its pid becomes that of a stranger, who must live on.

    The kernel would need days for it: the record gets the stranger's pid instead, and keeps the engine's start time.
    """
    victim = world.victim(dice, "ready", "sleeping")
    if victim is None:
        yield SKIPPED
        return
    world.daemon.kill()
    victim.signal(signal.SIGKILL)
    wait_until(lambda: not victim.members())
    stranger = world.bystander()
    path = world.state / "instances" / f"{victim.id}.json"
    path.write_text(path.read_text().replace(f'"pid": {victim.pid},', f'"pid": {stranger.pid},'))
    assert f'"pid": {stranger.pid},' in path.read_text()
    yield f"the pid of {victim.model} is that of a stranger ({stranger.pid})"
    _start(world)


def _start(world: World) -> None:
    """It may refuse while another fault is on; then it is started when that is over, and must not have broken."""
    try:
        world.daemon.start()
    except AssertionError:
        assert world.daemon.exited() and "Traceback" not in world.daemon.log, world.daemon.log
        world.refusals.append(world.daemon.log.strip().splitlines()[-1])


# --- the daemon lives, and is pestered ------------------------------------------------------------------------------

@fault(Group.DAEMON, (0.2, 1.0))
def hup_storm(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Reloads without end: nothing changes, and nobody notices."""
    count = dice.randint(10, 60)
    for _ in range(count):
        for pid in (world.daemon.pid, world.worker()):
            if pid is not None:
                world.daemon.signal(signal.SIGHUP, pid)
    yield f"{count} SIGHUPs to master and worker"


@fault(Group.DAEMON, (0.5, 3.0))
def stop_worker(world: World, dice: random.Random) -> Generator[str, None, None]:
    """SIGSTOP of the daemon's worker for a moment: requests take longer."""
    pid = world.worker()
    if pid is None:
        yield SKIPPED
        return
    world.daemon.signal(signal.SIGSTOP, pid)
    yield f"worker {pid}"
    world.daemon.signal(signal.SIGCONT, pid)


@fault(Group.DAEMON, (0.0, 0.1))
def second_daemon(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Another one on the same STATE_DIR refuses, and harms nothing."""
    done = subprocess.run([sys.executable, CHECKOUT / "app.py", "--host", "127.0.0.1", "--port", "0"],
                          cwd=world.daemon.folder, env=world.daemon.env, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 1 and "is in use by another daemon" in done.stderr, done
    assert "Traceback" not in done.stderr, done.stderr
    yield "it refused"


@fault(Group.DAEMON, (1.5, 4.0))
def config_broken(world: World, dice: random.Random) -> Generator[str, None, None]:
    """config.yaml as it is while somebody edits it badly: nothing changes."""
    good = json.dumps(config()).encode()
    how, text = dice.choice([("cut in half", good[:len(good) // 2]), ("empty", b""), ("gone", None),
                             ("no YAML", b"models: [}{"), ("bytes", bytes(range(256))),
                             ("an unknown key", b"models: {alpha: {model_path: org/alpha, colour: red}}")])
    world.write_config(text)
    yield how
    _restore(world)


@fault(Group.DAEMON, (1.5, 4.0), "model_not_found", "stopping", "not_ready", "engine_stopped")
def config_edited(world: World, dice: random.Random) -> Generator[str, None, None]:
    """One model is removed, another one changed and a new one added, under load."""
    removed, changed = dice.sample(MODELS, 2)
    edited = {name: entry(name) for name in MODELS if name != removed} | {"zeta": entry("zeta")}
    edited[changed]["params"] = edited[changed]["params"] | {"seed": dice.randrange(1000)}
    world.write_config(json.dumps({"models": edited}).encode())
    yield f"{removed} removed, {changed} changed"
    _restore(world)


def _restore(world: World) -> None:
    """config.yaml as it was, and in force."""
    world.restore_config()
    wait_until(lambda: world.daemon.exited() or _has_all_models(world))


def _has_all_models(world: World) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        names = {one["id"] for one in world.daemon.get("/v1/models").json["data"]}
        return set(MODELS) <= names and world.daemon.get("/health").json["config"]["error"] is None
    return False


@fault(Group.DAEMON, (0.5, 3.0), "processes", "state_dir",
       "no_gpu_memory", "engine_unreachable", "upstream_error", load.RESET, load.CUT)
def few_descriptors(world: World, dice: random.Random) -> Generator[str, None, None]:
    """The worker may open few files more, or none."""
    pid = world.worker()
    if pid is None:
        yield SKIPPED
        return
    left = dice.choice([0, 0, 3, 10])
    with limited(pid, resource.RLIMIT_NOFILE, descriptors(pid) + left):
        yield f"{left} more"


@fault(Group.DAEMON, (0.5, 2.0), "connection", "engine", "disk", "processes")
def memory_limit(world: World, dice: random.Random) -> Generator[str, None, None]:
    """The worker gets hardly any memory more from the system (RLIMIT_AS), or none: no thread in most cases."""
    pid = world.worker()
    if pid is None:
        yield SKIPPED
        return
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    left_mib = dice.choice([0, 0, 4, 16])
    with limited(pid, resource.RLIMIT_AS, pages * resource.getpagesize() + (left_mib << 20)):
        yield f"{left_mib} MiB more"


@fault(Group.DAEMON, (0.0, 0.5), load.CUT, from_strike=True)
def kill_relay(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of the process that carries streams: those are cut, the next ones are carried by another."""
    found = world.relays()
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            world.daemon.signal(signal.SIGKILL, pid)
    yield f"relay {found}" if found else SKIPPED


# --- an engine ------------------------------------------------------------------------------------------------------

def _kill_engine(world: World, dice: random.Random, what: str, *states: str) -> Generator[str, None, None]:
    victim = world.victim(dice, *states)
    if victim is None:
        yield SKIPPED
        return
    world.hit.add(victim.model)
    members = victim.members()
    if what == "server":
        members = [one for one in members if one.pid == victim.pid]
    elif what == "core":
        members = [one for one in members if "::EngineCore" in processes.command_line(one.pid)]
    elif what == "big":
        members = [one for one in members if not processes.is_resource_tracker(one.pid)]
    victim.signal(signal.SIGKILL, members)
    yield f"{victim.model} ({victim.state}, {victim.pid})"


@fault(Group.ENGINE, (0.0, 0.5), "engine", from_strike=True)
def kill_server(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of an API server alone: its EngineCore would live on and keep the GPU."""
    return _kill_engine(world, dice, "server", "ready", "sleeping")


@fault(Group.ENGINE, (0.0, 0.5), "engine", from_strike=True)
def kill_core(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of an EngineCore."""
    return _kill_engine(world, dice, "core", "ready", "sleeping")


@fault(Group.ENGINE, (0.0, 0.5), "engine", from_strike=True)
def kill_engine(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of every process of an engine at once."""
    return _kill_engine(world, dice, "all", "ready", "sleeping", "falling_asleep", "waking")


@fault(Group.ENGINE, (0.0, 0.5), "exited", "engine", from_strike=True)
def kill_loading(world: World, dice: random.Random) -> Generator[str, None, None]:
    """kill -9 of an engine that loads, of all of it but Python's small resource tracker, as for want of memory.  It may
    have come up since it was looked at, and serve."""
    return _kill_engine(world, dice, "big", "starting")


@fault(Group.ENGINE, (0.5, 2.0))
def pause_engine(world: World, dice: random.Random) -> Generator[str, None, None]:
    """SIGSTOP of an engine, SIGCONT before anybody gives it up: answers come later, and all of them."""
    victim = world.victim(dice, "ready")
    if victim is None:
        yield SKIPPED
        return
    members = victim.members()
    victim.signal(signal.SIGSTOP, members)
    yield f"{victim.model} ({victim.pid})"
    victim.signal(signal.SIGCONT, members)


@fault(Group.ENGINE, (0.0, 0.5), "engine", "engine_hung", from_strike=True)
def hang_engine(world: World, dice: random.Random) -> Generator[str, None, None]:
    """SIGSTOP of an engine that nobody wakes, of one that sleeps too: it is found and ended."""
    victim = world.victim(dice, "ready", "sleeping")
    if victim is None:
        yield SKIPPED
        return
    world.hit.add(victim.model)
    victim.signal(signal.SIGSTOP)
    yield f"{victim.model} ({victim.pid})"
    _wait_gone(world, victim)


@fault(Group.ENGINE, (0.0, 0.5), "engine", "engine_hung", from_strike=True)
def hang_requests(world: World, dice: random.Random) -> Generator[str, None, None]:
    """An engine that answers no request, though its health is good: it is found and ended."""
    victim = world.victim(dice, "ready")
    if victim is None or victim.port is None:
        yield SKIPPED
        return
    world.hit.add(victim.model)
    with contextlib.suppress(OSError):
        world.daemon.call("POST", "/sim", {"hang": True}, port=victim.port)
    yield f"{victim.model} ({victim.pid})"
    _wait_gone(world, victim)


def _wait_gone(world: World, victim: Victim) -> None:
    """Not while another fault of the same step holds the worker still: nobody would find the engine."""
    def held() -> bool:
        pid = world.worker()
        process = None if pid is None else processes.read_process(pid)
        return process is not None and process.stopped

    wait_until(lambda: world.daemon.exited() or not victim.members() or held())


# --- the machine ----------------------------------------------------------------------------------------------------

@fault(Group.MACHINE, (1.0, 4.0), "disk")
def full_disk(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Not a byte is left in STATE_DIR: no model is loaded, what is loaded serves on, every file stays whole."""
    world.disk.fill()
    yield f"STATE_DIR on {world.disk.name}"
    world.disk.free()


@fault(Group.MACHINE, (1.0, 4.0), "disk", "exited")
def full_log_disk(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Nobody can write a log any more, neither the daemon nor an engine."""
    world.shim.set("logs_full", 1)
    yield "the daemon's log and the engines'"
    world.shim.set("logs_full", 0)


@fault(Group.MACHINE, (1.0, 3.0))
def slow_disk(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Every write, fsync, rename and open in STATE_DIR takes its time."""
    each_ms = dice.choice([50, 200, 500])
    world.shim.set("slow_ms", each_ms)
    yield f"{each_ms} ms each"
    world.shim.set("slow_ms", 0)


@fault(Group.MACHINE, (0.5, 3.0))
def clock_jump(world: World, dice: random.Random) -> Generator[str, None, None]:
    """The wall clock jumps, and back: nobody idles, times out or is found dead for it."""
    offset_s = dice.choice([-400 * 86400, -3600, -30, 30, 3600, 400 * 86400])
    world.shim.set("clock_offset_s", offset_s)
    yield f"by {offset_s} s"
    world.shim.set("clock_offset_s", 0)


@fault(Group.MACHINE, (0.5, 3.0), "connection", "engine", "processes", "state_dir")
def no_process(world: World, dice: random.Random) -> Generator[str, None, None]:
    """The system grants neither a process nor a thread (EAGAIN), to the daemon and to engines."""
    world.shim.set("no_process", 1)
    yield "EAGAIN"
    world.shim.set("no_process", 0)


@fault(Group.MACHINE, (1.0, 4.0), "engine", "port_in_use", "no_free_port")
def port_stranger(world: World, dice: random.Random) -> Generator[str, None, None]:
    """An engine dies and a stranger takes its port, and the next ones, and answers 200 to everything."""
    victim = world.victim(dice, "ready")
    if victim is None or victim.port is None:
        yield SKIPPED
        return
    world.hit.add(victim.model)
    victim.signal(signal.SIGKILL)
    with contextlib.ExitStack() as strangers:
        for port in range(victim.port, victim.port + 4):
            with contextlib.suppress(OSError):
                strangers.enter_context(_stranger(port))
        yield f"the port {victim.port} of {victim.model}"


@contextmanager
def _stranger(port: int) -> Iterator[None]:
    server = _Server(("127.0.0.1", port), _Stranger)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked has gone."""


class _Stranger(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"data": [], "model": "stranger", "choices": [{"message": {"content": "I am a stranger"}}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@fault(Group.MACHINE, (1.0, 4.0), "no_gpu_memory", "engine_stopped")
def gpu_hog(world: World, dice: random.Random) -> Generator[str, None, None]:
    """Somebody else takes what is free of a GPU's memory."""
    device, hog = dice.choice([0, 1]), None
    free = world.box.capacity(device) / GIB - world.box.held(device)
    with contextlib.suppress(NoMemory):
        hog = world.box.hold(device, max(0.1, free - 0.5))
    yield f"{free:.0f} GiB of GPU {device}" if hog else SKIPPED
    if hog is not None:
        hog.free()


__all__ = ["FAULTS", "SKIPPED", "Fault", "shapes"]
