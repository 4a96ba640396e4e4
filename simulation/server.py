"""The API server of a simulated engine: its event loop, its signals, and what it does when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simulation.engine import Engine
from simulation.flags import Options
from simulation.http import Connection, Host
from simulation.knobs import Knobs
from simulation.log import err, log
from simulation.memory import Ledger
from simulation.metrics import Metrics
from simulation.processes import EngineProcess
from simulation.routes import Router
from simulation.service import Service
from simulation.startup import announce, runner_of

if TYPE_CHECKING:
    from ssl import SSLContext

DEATH_EXIT_IN_FLIGHT_S, DEATH_EXIT_IDLE_S, SIGNAL_GRACE_S = 0.7, 5.0, 0.02


def run(options: Options, knobs: Knobs, ledger: Ledger, processes: list[EngineProcess], listener: socket.socket,
        address: str) -> None:
    """Serves until a signal or the engine's death ends it.  Every child is dead when it returns."""
    asyncio.run(_run(options, knobs, ledger, processes, listener, address))


async def _run(options: Options, knobs: Knobs, ledger: Ledger, processes: list[EngineProcess],
               listener: socket.socket, address: str) -> None:
    metrics = Metrics(options.served_model_names[0])
    engine = Engine(knobs, metrics, max_num_seqs=options.max_num_seqs,
                    max_num_queued_reqs=options.max_num_queued_reqs,
                    on_chunk=lambda count: _die_on_chunk(engine, processes, count))
    service = Service(options, runner_of(options), engine, metrics, ledger, processes,
                      dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1", loras=dict(options.lora_modules))
    router = Router(service)
    keep_alive_s = float(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5"))
    host = Host(router.answer, keep_alive_s, options.access_log, options.access_log_skips)
    announce(options, [(", ".join(methods), path) for path, methods in router.table.items()], address)
    life = Life(service, host)
    life.watch()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(host), sock=listener, backlog=2048, ssl=_ssl_context(options))
    err(f"INFO:     Started server process [{os.getpid()}]\nINFO:     Waiting for application startup.\n"
        "INFO:     Application startup complete.")
    await life.over.wait()
    err("INFO:     Shutting down")
    server.close()
    host.close_idle()
    if host.in_flight and life.waits_for_clients:
        err("INFO:     Waiting for connections to close. (CTRL+C to force quit)")
    while life.waits_for_clients and host.in_flight:
        await asyncio.sleep(0.05)
    for connection in list(host.connections):
        connection.close()
    err("INFO:     Waiting for application shutdown.\nINFO:     Application shutdown complete.\n"
        f"INFO:     Finished server process [{os.getpid()}]")


def _ssl_context(options: Options) -> SSLContext | None:
    if options.ssl_files is None:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*options.ssl_files)
    return context


def _die_on_chunk(engine: Engine, processes: list[EngineProcess], count: int) -> None:
    """The knobs that kill a process in the middle of an answer: it gets no chance to say anything."""
    knobs = engine.knobs
    if knobs.die_engine_after_chunks is not None and count >= knobs.die_engine_after_chunks:
        processes[0].signal(signal.SIGKILL)
        engine.vanish()                 # no token comes from the dead, however late its death is noticed
    if knobs.die_after_chunks is not None and count >= knobs.die_after_chunks:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Life:
    """Why and when the server ends.  All methods run on the event loop."""

    service: Service
    host: Host
    over: asyncio.Event = field(default_factory=asyncio.Event)
    waits_for_clients: bool = False     # the hang of a SIGTERM with requests in flight
    _stopping: asyncio.Task[None] | None = None

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for process in self.service.processes:
            loop.add_reader(process.alive_fd, self._on_engine_end, process)

    def _on_signal(self) -> None:
        """Only the first counts: as vLLM, it is deaf to every further one."""
        if self._stopping is None:
            log("APIServer", "[shutdown] API server: shutdown triggered", where="launcher.py:254")
            self._stopping = asyncio.get_running_loop().create_task(self._stop())

    async def _stop(self) -> None:
        timeout_s = self.service.options.shutdown_timeout_s
        log("APIServer", f"[shutdown] API server: stopping engine client mode={'drain' if timeout_s else 'abort'} "
                         f"timeout={timeout_s}s", where="launcher.py:270")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while timeout_s and self.host.in_flight:
                    await asyncio.sleep(0.02)
        self.service.engine.vanish()
        await asyncio.gather(*(self._end(process) for process in self.service.processes))
        self.service.ledger.release()
        log("APIServer", "[shutdown] API server: engine client stopped", where="launcher.py:279")
        log("APIServer", "[shutdown] API server: shutting down FastAPI HTTP server", where="launcher.py:304")
        self.waits_for_clients = self.service.engine.knobs.ignore_term_in_flight
        self.over.set()

    async def _end(self, process: EngineProcess) -> None:
        asyncio.get_running_loop().remove_reader(process.alive_fd)
        process.signal(signal.SIGTERM)
        await asyncio.to_thread(os.waitpid, process.pid, 0)

    def _on_engine_end(self, process: EngineProcess) -> None:
        """The engine's end of its pipe is closed.  A signal to the whole group ends it too: that one is heard first."""
        loop = asyncio.get_running_loop()
        for each in self.service.processes:
            loop.remove_reader(each.alive_fd)
        loop.call_later(SIGNAL_GRACE_S, self._on_engine_death, process)

    def _on_engine_death(self, process: EngineProcess) -> None:
        if self._stopping is not None:
            return
        loop = asyncio.get_running_loop()
        in_flight = self.service.engine.unfinished_count
        log("APIServer", f"Engine core proc {process.name} died unexpectedly, shutting down client.",
            where="core_client.py:739", level="ERROR")
        log("APIServer", "AsyncLLM output_handler failed.\nvllm.v1.engine.exceptions.EngineDeadError: EngineCore "
                         "encountered an issue. See stack trace (above) for the root cause.",
            where="async_llm.py:906", level="ERROR")
        self.service.engine.die()
        self.service.ledger.release()
        for each in self.service.processes:
            each.signal(signal.SIGKILL)
            os.waitpid(each.pid, 0)
        delay_s = self.service.engine.knobs.engine_death_exit_s
        if delay_s is None:
            delay_s = DEATH_EXIT_IN_FLIGHT_S if in_flight else DEATH_EXIT_IDLE_S
        loop.call_later(delay_s, self.over.set)
