"""Real process trees, made small: found by session, told from strangers, ended with all that they leave behind."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from instances import launcher as launcher_module
from instances import processes
from instances.launcher import Engine, EngineRecord, Launcher, LaunchError, LaunchRefused, LaunchSpec, remove_run_dir
from instances.sockets import Listener
from tests.support import wait_until

ID = secrets.token_hex(4)       # of this process alone: what bears it is ended
TREE = """
import os, signal, socket, sys
from pathlib import Path

def say(*words):
    print(*words, flush=True)

def child(title=None, deaf=True):
    pid = os.fork()
    if pid == 0:
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if title:
            from setproctitle import setproctitle
            setproctitle(title)
        say("ready")
        signal.pause()
    return pid

mode = sys.argv[1].split()
if "deaf" in mode:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "titled" in mode:
    child(os.environ["VLLM_PROCESS_NAME_PREFIX"] + "::EngineCore")
if "untitled" in mode:
    child()
if "shared" in mode:
    from multiprocessing.shared_memory import SharedMemory
    memory = SharedMemory(create=True, size=4096)
    child()
    say("memory", memory.name)
if "maps" in mode:
    import mmap
    mapped = []
    for path in sys.argv[2:]:
        with open(path, "r+b") as file:
            mapped.append(mmap.mmap(file.fileno(), 0))
if "listens" in mode:
    server = socket.create_server((sys.argv[2], 0))
    child()
    say("port", server.getsockname()[1])
if "makes" in mode:
    say("ready")
    number, last = 0, None
    while True:
        number += 1
        path = f"/dev/shm/psm_{sys.argv[2]}_{number}"
        made = os.open(path, os.O_CREAT | os.O_RDWR)
        if last is not None:
            os.unlink(last[0])
            os.close(last[1])
        last = path, made
say("environment", *os.environ)
say("ready")
signal.pause()
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    tree = Tree(tmp_path, temporary)
    yield tree
    for engine in tree.engines:
        processes.kill_session(engine.pid, wait=launcher_module.wait_until)
        wait_until(lambda engine=engine: engine.exit_code() is not None)  # type: ignore[misc]


class Tree:
    """Launches the script above."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.script = folder / "tree.py"
        self.script.write_text(TREE)
        self.temporary = temporary
        self.log_path = folder / "logs" / f"{ID}.log"
        self.launcher = Launcher()
        self.engines: list[Engine] = []

    def spec(self, mode: str, *arguments: str, env: dict[str, str] | None = None) -> LaunchSpec:
        return LaunchSpec(ID, [sys.executable, "-E", str(self.script), mode, *arguments],
                          {"PATH": os.environ["PATH"], **(env or {})}, self.log_path)

    def launch(self, mode: str, *arguments: str, ready: int = 1, env: dict[str, str] | None = None) -> Engine:
        """`ready`: how many processes have to report."""
        engine = self.launcher.launch(self.spec(mode, *arguments, env=env))
        self.engines.append(engine)
        wait_until(lambda: self.log_path.read_text().count("ready\n") >= ready)
        return engine

    def told(self, word: str) -> str:
        lines = self.log_path.read_text().splitlines()
        return next(line for line in lines if line.startswith(word + " ")).partition(" ")[2]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.engines[-1].exit_code() is not None or processes.read_process(pid) is None
                   or not any(member.pid == pid for member in processes.session_members(self.engines[-1].pid)))

    def nothing_left(self, engine: Engine) -> bool:
        return not processes.session_members(engine.pid) and list(self.temporary.iterdir()) == []


@contextmanager
def stranger(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else, in a session of its own."""
    child = subprocess.Popen(arguments or ["sleep", "600"], start_new_session=True)
    try:
        yield child
        assert child.poll() is None, "a stranger was killed"
    finally:
        child.kill()
        child.wait()


@contextmanager
def shared_file(name: str) -> Iterator[Path]:
    path = Path("/dev/shm") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"weights")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            if path.parent != Path("/dev/shm"):
                path.parent.rmdir()


# --- launching --------------------------------------------------------------------------------------------------------

def test_an_engine_has_a_session_a_log_and_a_folder_of_its_own(tree: Tree) -> None:
    engine = tree.launch("plain")
    assert os.getsid(engine.pid) == engine.pid
    assert engine.running() and engine.exit_code() is None
    environment = processes.environment(engine.pid)
    run_dir = engine.record.run_dir
    assert Path(run_dir).parent == tree.temporary and len(run_dir) < 200
    assert {name: environment[name] for name in ("VLLM_PROCESS_NAME_PREFIX", "VLLM_RPC_BASE_PATH", "TMPDIR")} == {
        "VLLM_PROCESS_NAME_PREFIX": ID, "VLLM_RPC_BASE_PATH": run_dir, "TMPDIR": run_dir}
    assert Path(f"/proc/{engine.pid}/fd/0").readlink() == Path(os.devnull)
    assert tree.log_path.stat().st_mode & 0o777 == 0o600
    assert engine.destroy()
    assert tree.nothing_left(engine)


@pytest.mark.parametrize("error", [None, PermissionError, ProcessLookupError])
def test_an_engine_may_not_go_before_others_though_the_daemon_may(tree: Tree, monkeypatch: pytest.MonkeyPatch,
                                                                  error: type[OSError] | None) -> None:
    """By limit.  Where none can be set, the engine runs all the same, and is known."""
    asked: list[tuple[object, ...]] = []

    def prlimit(*arguments: object) -> None:
        asked.append(arguments)
        if error is not None:
            raise error
    monkeypatch.setattr(resource, "prlimit", prlimit)
    engine = tree.launch("plain")
    assert engine.running() and asked == [(engine.pid, resource.RLIMIT_RTPRIO, (0, 0))]


def test_the_first_variable_is_one_that_nobody_sets_anew(tree: Tree) -> None:
    tree.launch("plain")
    assert tree.told("environment").split()[0] == "VLLM_PROCESS_NAME_PREFIX"


def test_what_torch_compiled_outlives_the_run(tree: Tree) -> None:
    engine = tree.launch("plain")
    cache = Path(processes.environment(engine.pid)["TORCHINDUCTOR_CACHE_DIR"])
    assert cache.parent == tree.temporary and not str(cache).startswith(engine.record.run_dir)


def test_the_users_own_compile_cache_is_his(tree: Tree) -> None:
    engine = tree.launch("plain", env={"TORCHINDUCTOR_CACHE_DIR": "/mine"})
    assert processes.environment(engine.pid)["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("command", ["/no/such/program", os.devnull, "/etc/hostname"])
def test_a_command_that_cannot_be_run(tree: Tree, command: str) -> None:
    spec = replace(tree.spec("plain"), argv=[command, "serve"])
    with pytest.raises(LaunchError, match="VLLM_COMMAND") as caught:
        tree.launcher.launch(spec)
    assert command in caught.value.message
    assert list(tree.temporary.iterdir()) == []


def test_a_system_that_is_out_of_something(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    monkeypatch.setattr(launcher_module.subprocess, "Popen", refuse)
    with pytest.raises(LaunchRefused):
        tree.launcher.launch(tree.spec("plain"))
    assert list(tree.temporary.iterdir()) == []


def test_a_log_that_cannot_be_opened_starts_nothing(tree: Tree) -> None:
    tree.log_path.parent.write_text("a file where a folder should be")
    with pytest.raises(OSError):
        tree.launcher.launch(tree.spec("plain"))
    assert list(tree.temporary.iterdir()) == []


def test_the_log_of_the_start_before_is_kept(tree: Tree) -> None:
    tree.launch("plain").destroy()
    first = tree.log_path.read_text()
    tree.log_path.write_text(first + "its last words\n")
    tree.launch("plain")
    assert tree.log_path.with_name(f"{ID}.log.1").read_text() == first + "its last words\n"
    assert "its last words" not in tree.log_path.read_text()


# --- ending -----------------------------------------------------------------------------------------------------------

def test_orphans_of_a_dead_server_are_ended(tree: Tree) -> None:
    engine = tree.launch("untitled", ready=2)
    assert len(engine.pids()) == 2
    tree.kill(engine.pid)
    assert not engine.running() and engine.exit_code() == -signal.SIGKILL
    assert len(engine.pids()) == 1      # it would stay for ever
    assert engine.destroy()
    assert tree.nothing_left(engine)


def test_sigterm_is_for_the_server_alone_and_may_be_swallowed(tree: Tree) -> None:
    engine = tree.launch("deaf untitled", ready=2)
    engine.terminate()
    os.kill(engine.pid, signal.SIGCONT)
    assert engine.running() and len(engine.pids()) == 2
    assert engine.destroy()
    assert tree.nothing_left(engine)


def test_a_server_that_ends_at_sigterm(tree: Tree) -> None:
    engine = tree.launch("plain")
    engine.terminate()
    wait_until(lambda: not engine.running())
    assert engine.exit_code() == -signal.SIGTERM
    assert engine.destroy() and engine.destroy()        # a second time finds nothing
    assert tree.nothing_left(engine)


def test_the_resource_tracker_is_spared_and_cleans_up(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tree.launch("shared", ready=2)
    block = Path("/dev/shm") / tree.told("memory")
    tracker, = [member for member in processes.session_members(engine.pid)
                if processes.is_resource_tracker(member.pid)]
    assert block.exists()
    monkeypatch.setattr(processes, "remove_shared_memory", lambda files: None)     # it has to do it alone
    assert engine.destroy()
    assert not block.exists()
    assert not tracker.alive()
    assert tree.nothing_left(engine)


@pytest.mark.parametrize("known", [True, False])
def test_what_makes_shared_memory_as_it_is_killed_leaves_none(tree: Tree, known: bool) -> None:
    """No tracker was told of it yet, and a list of it made before would be short by it."""
    engine = tree.launch("makes", ID)
    if known:
        assert engine.destroy()
    else:
        tree.launcher.end_remains(ID, None)
        wait_until(lambda: engine.exit_code() is not None)
    assert list(Path("/dev/shm").glob(f"psm_{ID}_*")) == []


@pytest.mark.parametrize("later", [False, True])
def test_shared_memory_is_removed_where_no_tracker_is_left(tree: Tree, later: bool) -> None:
    """Everything was killed, by the kernel for want of memory, say."""
    engine = tree.launch("shared", ready=2)
    block = Path("/dev/shm") / tree.told("memory")
    engine.watch_core()
    for _ in range(3):
        for pid in engine.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not engine.pids())
    assert block.exists()
    if later:       # by a daemon that was not there when it died
        assert tree.launcher.find(ID, engine.record, tree.log_path) is None
        tree.launcher.end_remains(ID, engine.record)
    else:
        assert engine.destroy()
    assert not block.exists()


def test_only_files_that_engines_make_are_removed(tree: Tree) -> None:
    """People keep models in /dev/shm; the engine maps them, and they are not its own."""
    with shared_file(f"model-{os.getpid()}.gguf") as model, \
            shared_file(f"models-{os.getpid()}/psm_weights") as inside, \
            shared_file(f"psm_{os.getpid()}used") as used, \
            shared_file(f"psm_{os.getpid()}left") as left, open(used, "rb"):
        engine = tree.launch("maps", *map(str, (model, inside, used, left)))
        tree.kill(engine.pid)
        engine = tree.launch("maps", *map(str, (model, inside, used, left)))
        assert engine.destroy()
        assert [path.exists() for path in (model, inside, used, left)] == [True, True, True, False]
        edited = replace(engine.record, shared_memory=(str(model), str(inside), str(used), "/etc/hostname"))
        tree.launcher.end_remains(ID, edited)
        assert model.exists() and inside.exists() and used.exists() and Path("/etc/hostname").exists()


# --- watching ---------------------------------------------------------------------------------------------------------

def test_the_death_of_an_engine_process_is_seen(tree: Tree) -> None:
    engine = tree.launch("titled untitled", ready=3)
    titled = [pid for pid in engine.pids() if processes.command_line(pid).startswith(f"{ID}::EngineCore")]
    other = [pid for pid in engine.pids() if pid not in (*titled, engine.pid)]
    engine.watch_core()
    assert engine.dead_core() is None
    tree.kill(other[0])
    assert engine.dead_core() is None       # a helper comes and goes
    tree.kill(titled[0])
    assert engine.dead_core() == titled[0]
    assert engine.running()


def test_who_listens_is_told_by_the_session(tree: Tree) -> None:
    engine = tree.launch("listens", "127.0.0.1", ready=2)
    assert engine.listener(int(tree.told("port"))) is Listener.OURS
    with socket.create_server(("127.0.0.1", 0)) as mine:
        assert engine.listener(mine.getsockname()[1]) is Listener.STRANGER


def test_an_engine_open_to_other_machines_is_told(tree: Tree) -> None:
    engine = tree.launch("listens", "0.0.0.0", ready=2)
    assert engine.listener(int(tree.told("port"))) is Listener.EXPOSED


# --- after another daemon ---------------------------------------------------------------------------------------------

def test_an_engine_that_runs_is_found_by_pid_and_start_time(tree: Tree) -> None:
    engine = tree.launch("untitled", ready=2)
    found = Launcher().find(ID, engine.record, tree.log_path)
    assert found is not None and found.running() and found.exit_code() is None
    assert sorted(found.pids()) == sorted(engine.pids())
    found.terminate()
    wait_until(lambda: not found.running())     # a zombie, as long as its parent does not look
    assert found.destroy()
    assert tree.nothing_left(engine)


def test_a_pid_that_another_process_has_now_is_not_touched(tree: Tree) -> None:
    with stranger() as other:
        process = processes.read_process(other.pid)
        assert process is not None
        record = EngineRecord(other.pid, process.started_ticks - 1, processes.boot_id(), str(tree.temporary))
        assert tree.launcher.find(ID, record, tree.log_path) is None
        tree.launcher.end_remains(ID, record)
        adopted = Engine(instance_id=ID, record=record, log_path=tree.log_path, child=None)
        assert adopted.destroy()        # nothing of ours is left
        adopted.terminate()
        os.kill(other.pid, 0)


def test_a_session_that_others_have_now_is_not_touched(tree: Tree) -> None:
    """The number was given to a session of somebody else, whose leader has ended."""
    script = "import os, signal; os.fork() or signal.pause(); print(end='', flush=True)"
    other = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    other.wait()
    orphan, = processes.session_members(other.pid)
    try:
        record = EngineRecord(other.pid, orphan.started_ticks - 100, processes.boot_id(), "")
        tree.launcher.end_remains(ID, record)
        assert orphan.alive()
    finally:
        processes.send_signal(orphan, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["titled", "untitled"])
def test_orphans_that_another_daemon_left_are_ended(tree: Tree, mode: str) -> None:
    engine = tree.launch(mode, ready=2)
    tree.kill(engine.pid)
    assert len(engine.pids()) == 1
    later = Launcher()
    assert later.find(ID, engine.record, tree.log_path) is None
    later.end_remains(ID, engine.record)
    assert tree.nothing_left(engine)


def test_an_engine_without_a_record_is_ended_by_its_name(tree: Tree) -> None:
    """The daemon died between starting it and writing its pid down."""
    engine = tree.launch("titled", ready=2)
    with stranger(sys.executable, "-c", "import signal; signal.pause()", f"{ID}::grep") as innocent:
        Launcher().end_remains(ID, None)
        assert innocent.poll() is None
    wait_until(lambda: engine.exit_code() is not None)
    assert tree.nothing_left(engine)


def test_a_folder_that_cannot_be_removed_now_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vllm-server-abc"
    (folder / "sub").mkdir(parents=True)

    def blind(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", blind)
        with pytest.raises(OSError, match="Too many open files"):
            remove_run_dir(str(folder))
    assert folder.exists()
    remove_run_dir(str(folder))
    assert not folder.exists()
    remove_run_dir(str(folder))


def test_what_cannot_be_written_down_does_not_run(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last descriptor may go between the start and the look at what was started."""
    def blind(pid: int | str) -> None:
        if isinstance(pid, int):
            started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    started: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "read_process", blind)
        patch.setattr(os, "scandir", blind)
        with pytest.raises(OSError, match="Too many open files"):
            tree.launcher.launch(tree.spec("plain"))
    assert len(started) == 1 and not processes.session_members(started[0])
    assert list(tree.temporary.iterdir()) == []


def test_a_folder_that_no_record_names_yet_is_found_by_the_instances_id(tree: Tree) -> None:
    """Its daemon was killed after it had made the folder, and before it had started the engine."""
    other = tree.temporary / "vllm-server-00000000-abcdefgh"
    for path in (tree.temporary / f"vllm-server-{ID}-abcdefgh", other):
        path.mkdir()
    tree.launcher.end_remains(ID, None)
    assert list(tree.temporary.iterdir()) == [other]


def test_a_start_that_the_record_missed_is_ended_too(tree: Tree) -> None:
    """The record still names the engine before."""
    first = tree.launch("plain")
    first.destroy()
    second = tree.launch("untitled", ready=2)
    Launcher().end_remains(ID, first.record)
    assert tree.nothing_left(second)


def test_a_record_from_before_the_last_boot_names_no_process_of_now(tree: Tree) -> None:
    folder = tree.temporary / "vllm-server-old"
    folder.mkdir()
    with stranger() as other:
        process = processes.read_process(other.pid)
        assert process is not None
        record = EngineRecord(other.pid, process.started_ticks, "another-boot", str(folder))
        assert tree.launcher.find(ID, record, tree.log_path) is None
        tree.launcher.end_remains(ID, record)
    assert not folder.exists()


def test_only_folders_of_ours_are_removed(tmp_path: Path) -> None:
    precious, ours = tmp_path / "precious", tmp_path / "vllm-server-abc"
    precious.mkdir()
    ours.mkdir()
    for path in (precious, ours, Path()):
        remove_run_dir(str(path))
    assert precious.exists() and not ours.exists()
