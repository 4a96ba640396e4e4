"""The other processes of a server: EngineCores with their Workers, made by fork before the event loop exists.

As in vLLM they stay in the server's session, hold a psm_* block of shared memory that the resource_tracker of the
server cleans up after a kill, leave ipc sockets behind, and live on when only the API server is killed.
An EngineCore whose Worker dies ends; a Worker whose EngineCore dies ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from simulation.flags import Options
from simulation.knobs import Knobs
from simulation.log import log

if TYPE_CHECKING:
    from multiprocessing.shared_memory import SharedMemory

SERVING, EXIT = b"S", b"X"              # what the API server tells an engine


@dataclass(frozen=True)
class Worker:
    pid: int
    name: str


@dataclass(frozen=True)
class EngineProcess:
    pid: int
    name: str                           # EngineCore, or EngineCore_DP0 …
    workers: tuple[Worker, ...]
    alive_fd: int                       # reads EOF when the engine is dead
    control_fd: int

    def tell(self, what: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):      # it is dead; alive_fd says so
            os.write(self.control_fd, what)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def device_processes(self) -> tuple[tuple[int, str], ...]:
        """Pids and names of the processes that hold the devices' memory, by rank."""
        return tuple((worker.pid, worker.name) for worker in self.workers) or ((self.pid, self.name),)


def spawn_engines(options: Options, knobs: Knobs, meanwhile: Callable[[], object]) -> list[EngineProcess]:
    """Forks them, runs `meanwhile`, and returns when each has its title, memory and sockets.

    Raises OSError when one cannot have them.
    """
    resource_tracker.ensure_running()
    ranks = range(options.data_parallel_size)
    forked = [_fork_engine(f"EngineCore_DP{rank}" if len(ranks) > 1 else "EngineCore", rank, options, knobs)
              for rank in ranks]
    meanwhile()
    return [_await_report(engine) for engine in forked]


def _fork_engine(name: str, rank: int, options: Options, knobs: Knobs) -> EngineProcess:
    alive_read, alive_write = os.pipe()
    control_read, control_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: run_engine(name, rank, options, knobs, alive_write, control_read))
    os.close(alive_write)
    os.close(control_read)
    return EngineProcess(pid, name, (), alive_read, control_write)


def _await_report(engine: EngineProcess) -> EngineProcess:
    """The engine with its workers, which it names when it is ready."""
    report = os.read(engine.alive_fd, 65536).decode()
    if not report.startswith("ready"):
        os.waitpid(engine.pid, 0)
        raise OSError(report or f"{engine.name} died while it started")
    workers = (Worker(int(number), label) for number, label in (item.split("=") for item in report.split()[1:]))
    return replace(engine, workers=tuple(workers))


def worker_names(rank: int, options: Options, knobs: Knobs) -> list[str]:
    """Titles as vLLM's: with one device on a GPU the engine is its own worker."""
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    if tensor * pipeline == 1 and knobs.device != "cpu":
        return []
    head = "Worker" + (f"_DP{rank}" if options.data_parallel_size > 1 else "")
    return [head + (f"_PP{stage}" if pipeline > 1 else "") + (f"_TP{part}" if tensor > 1 else "")
            for stage in range(pipeline) for part in range(tensor)]


def title_prefix() -> str:
    return os.environ.get("VLLM_PROCESS_NAME_PREFIX") or "VLLM"


def set_title(name: str) -> None:
    from setproctitle import setproctitle
    setproctitle(f"{title_prefix()}::{name}")


def _in_child(body: Callable[[], int]) -> None:
    """Runs `body()` in a fork and ends the process: nothing of the parent's stack may run twice."""
    code = 1
    try:
        code = body()
    except BaseException:               # the process ends here whatever it was
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)


def _close_all_but(keep: set[int]) -> None:
    """A fork inherits the server's sockets and pipes, which must close when the server dies, not when the child does.

    The resource_tracker's pipe stays open, as vLLM's children hold it: the tracker waits for the last of them.
    """
    tracker_fd: int | None = resource_tracker.getfd()
    keep = keep | {0, 1, 2} | ({tracker_fd} if tracker_fd is not None else set())
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number not in keep:
            with contextlib.suppress(OSError):          # the directory's own descriptor
                os.close(number)


def run_engine(name: str, rank: int, options: Options, knobs: Knobs, alive_fd: int, control_fd: int) -> int:
    """The body of an EngineCore.  `alive_fd` gets one report; `control_fd` brings SERVING and EXIT."""
    _close_all_but({alive_fd, control_fd})
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    set_title(name)
    life_read, life_write = os.pipe()
    workers = [_spawn_worker(label, life_read) for label in worker_names(rank, options, knobs)]
    os.close(life_read)
    try:
        memory = _shared_memory(knobs.shm_bytes)
        sockets = _ipc_sockets(len(workers))
    except OSError as error:
        os.write(alive_fd, str(error).encode())
        return 1
    os.write(alive_fd, " ".join(["ready", *(f"{worker.pid}={worker.name}" for worker in workers)]).encode())
    code = _engine_loop(name, workers, control_fd, wake_read)
    for each in sockets:
        each.close()                    # the files stay, as vLLM's do
    memory.close()
    memory.unlink()
    return code


def _engine_loop(name: str, workers: list[Worker], control_fd: int, wake_fd: int) -> int:
    """Until the API server or a signal ends it; a signal while the server loads is swallowed."""
    serving, watched = False, [control_fd, wake_fd]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if control_fd in ready:
            message = os.read(control_fd, 64)
            if not message:             # the API server is dead: an orphan goes on for ever
                serving = True
                watched.remove(control_fd)
            elif EXIT in message:
                return 0
            else:
                serving = True
        if wake_fd not in ready:
            continue
        for number in os.read(wake_fd, 64):
            if number == signal.SIGCHLD:
                dead = [worker for worker in workers if os.waitpid(worker.pid, os.WNOHANG)[0]]
                for worker in dead:
                    log(name, f"Worker proc {worker.name} died unexpectedly (exit code: -9), shutting down executor.",
                        where="multiproc_executor.py:315", level="ERROR")
                if dead:
                    return 0
            elif serving:
                log(name, f"[shutdown] EngineCore: trigger received signal={signal.Signals(number).name}",
                    where="core.py:1454")
                return 0


def _spawn_worker(name: str, life_fd: int) -> Worker:
    """Returns when it has its title, or is dead."""
    titled_read, titled_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: run_worker(name, life_fd, titled_write))
    os.close(titled_write)
    os.read(titled_read, 1)
    os.close(titled_read)
    return Worker(pid, name)


def run_worker(name: str, life_fd: int, titled_fd: int) -> int:
    """The body of a Worker: it closes `titled_fd` when it has its title, and ends when its engine is dead."""
    _close_all_but({life_fd, titled_fd})
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    set_title(name)
    os.close(titled_fd)
    os.read(life_fd, 1)
    return 0


def _shared_memory(size_bytes: int) -> SharedMemory:
    """Named psm_* as Python does it, with the instance's id in it: one that is left behind tells whose it was."""
    from multiprocessing.shared_memory import SharedMemory  # slow to import: only the engine pays
    return SharedMemory(f"psm_{title_prefix()}_{os.urandom(4).hex()}", create=True, size=size_bytes)


def _ipc_sockets(worker_count: int) -> list[socket.socket]:
    """Bound in VLLM_RPC_BASE_PATH when that is set: without it they would litter the folder for temporary files."""
    folder = os.environ.get("VLLM_RPC_BASE_PATH")
    sockets = []
    for _ in range(4 + worker_count if folder else 0):
        raw = os.urandom(16).hex()
        path = f"{folder}/{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
        each = socket.socket(socket.AF_UNIX)
        try:
            each.bind(path)
        except OSError as error:
            raise OSError(f'zmq.error.ZMQError: ipc path "{path}": {error}') from error
        sockets.append(each)
    return sockets
