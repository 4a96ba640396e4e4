"""A box with eight GPUs of 80 GiB and forty models of five sizes, which need 2.5 times as much: a world for tests.

Time is compressed: a start takes a second or less, a model idles for seconds, foreigners stay for a while.  What runs
takes seconds as it would take minutes on a real box.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.memory_picture import Moment, Recorder
from tests.gpu_box import GIB, Foreign, GpuBox, NoMemory
from tests.three_models import loads
from tests.traffic import Ask, Exchange, run_clients

GPUS, GPU_GIB = 8, 80.0
CLIENTS = 100
SETTINGS = {"MAX_HOLD_SECONDS": "3", "VLLM_DEFAULT_TIMEOUT": "6", "VLLM_MAX_INSTANCES": "60",
            "SLEEP_HOST_MEMORY_MB": str(200 * 1024)}


@dataclass(frozen=True)
class Size:
    """Models of one size.  `weights_gib` of the whole model, `share` of all requests to all of them together."""

    name: str
    count: int
    weights_gib: float
    gpus: int
    start_s: float
    share: float
    colour: str
    more: dict[str, Any]        # of their entries in config.yaml


SIZES = (
    Size("tiny", 12, 3, 1, 0.2, 0.40, "#7fb3d5", {"memory_mb": 6 * 1024}),                  # its size is given
    Size("small", 12, 14, 1, 0.4, 0.30, "#2e86c1", {"max_model_len": 8192}),                # by its files
    Size("medium", 8, 30, 1, 0.6, 0.20, "#28b463", {"max_model_len": 8192, "sleep": 1}),
    Size("large", 4, 60, 2, 0.8, 0.07, "#f39c12", {"gpus": 2, "max_model_len": 8192}),
    Size("huge", 4, 200, 4, 1.0, 0.03, "#c0392b", {"gpus": 4, "max_model_len": 8192, "priority": 1}),
)
KINDS = {size.name: (size.colour, f"{size.count} {size.name} ({size.weights_gib:g} GiB, {size.gpus} GPU"
                                  f"{'s' if size.gpus > 1 else ''})") for size in SIZES} | {
    "foreign": ("#777", "foreign")}
SCHEDULE = ((8, 2, 30.0, 22), (12, 5, 60.0, 12), (20, 0, 15.0, 35), (30, 7, 45.0, 15), (42, 3, 70.0, 10))
"""Foreigners: when (seconds), on which GPU, how many GiB at the most, for how long."""
PERIOD_S = 60.0
LOOK_S = 0.5        # at most, from the last look at the devices until the launch is in the log: it is a busy machine


@dataclass(frozen=True)
class Visit:
    """A foreigner that comes or goes: when (wall clock), and to which GPU."""

    at: float
    device: int
    comes: bool


@dataclass(frozen=True)
class Outcome:
    exchanges: list[Exchange]
    loads: int
    refused: list[str]          # claims that found no room
    visits: list[Visit]
    moments: list[Moment]
    log: str


def names(size: Size) -> list[str]:
    return [f"{size.name}-{number}" for number in range(size.count)]


def config(models: Path) -> dict[str, Any]:
    """Half of the models lie in `models`, as files whose size alone matters."""
    entries: dict[str, Any] = {}
    for size in SIZES:
        for name in names(size):
            knobs = {"start_s": size.start_s, "weights_mb": size.weights_gib * 1024, "tokens_per_s": 100}
            path = f"org/{name}"
            if "memory_mb" not in size.more:
                path = str(_model_files(models / name, size))
                del knobs["weights_mb"]
            entries[name] = {"model_path": path, "params": {"additional_config": {"sim": knobs}}, **size.more}
    return {"models": entries}


def _model_files(folder: Path, size: Size) -> Path:
    """A llama's configuration, and weights that are as long as real ones and take no room on the disk."""
    folder.mkdir(parents=True)
    layers = {"small": 32, "medium": 48, "large": 64, "huge": 80}[size.name]
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 8192, "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16"}))
    with open(folder / "model.safetensors", "wb") as file:
        os.truncate(file.fileno(), int(size.weights_gib * GIB))
    return folder


def choose(client: int, number: int) -> Ask:
    """A size by its share, and of it the first models most often."""
    dice = random.Random(client * 100_003 + number)
    size = dice.choices(SIZES, [size.share for size in SIZES])[0]
    model = names(size)[min(int(dice.expovariate(3 / size.count)), size.count - 1)]
    return Ask(model, dice.randint(1, 20), dice.random() < 0.3, dice.random() * 2)


class Foreigners:
    """They come and go by SCHEDULE, again and again, and ask nobody: each takes the most of what is free then."""

    def __init__(self, box: GpuBox) -> None:
        self._box = box
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreigners")
        self.visits: list[Visit] = []

    def __enter__(self) -> Foreigners:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began, here = time.monotonic(), {}
        events = sorted([(at, visit) for visit in SCHEDULE for at in (visit[0], visit[0] + visit[3])])
        for at, visit in ((lap * PERIOD_S + at, visit) for lap in itertools.count() for at, visit in events):
            if self._over.wait(max(0.0, began + at - time.monotonic())):
                return
            if visit in here:
                here.pop(visit).free()
                self.visits.append(Visit(time.time(), visit[1], comes=False))
            elif (foreign := self._come(*visit[1:3])) is not None:
                here[visit] = foreign

    def _come(self, device: int, gib: float) -> Foreign | None:
        free = self._box.capacity(device) / GIB - self._box.held(device)
        with contextlib.suppress(NoMemory):
            foreign = self._box.hold(device, min(gib, free * 0.95))
            self.visits.append(Visit(time.time(), device, comes=True))
            return foreign
        return None


def run(folder: Path, seconds: float, clients: int = CLIENTS) -> Outcome:
    """The world for so long; afterwards nothing of the daemon is left."""
    with GpuBox(folder, [GPU_GIB] * GPUS, SETTINGS, config=config(folder / "models")) as box:
        with Recorder(box.memory) as recorder, Foreigners(box) as foreigners:
            exchanges = run_clients(f"http://127.0.0.1:{box.daemon.port}", clients, choose, seconds)
        box.daemon.remove()
        log = box.daemon.log
        return Outcome(exchanges, loads(log), box.refused(), foreigners.visits, recorder.moments, log)


def spoilt(outcome: Outcome) -> list[str]:
    """Starts and wakes that found less memory than was there when they began, by what their engines were refused.

    No machine can prevent these: a foreigner came to that GPU (or gave back memory while an engine measured) after the
    daemon had looked for the last time, and before the engine had taken all that it was promised.
    """
    places: list[tuple[str, float, set[int]]] = []      # id, when it was promised them, GPUs
    begun: list[tuple[str, float]] = []
    for line in outcome.log.splitlines():
        if found := re.search(r"([0-9a-f]{8}) \(\S+\): (?:devices \[([\d, ]+)\]|launched, )", line):
            if found[2]:
                places.append((found[1], _seconds(line), set(map(int, found[2].split(", ")))))
            else:
                begun.append((found[1], _seconds(line)))
    hit = []
    for line in outcome.refused:
        at, name = float(line.split()[0]), line.split()[1]
        gpus = next((gpus for one, when, gpus in reversed(places) if one == name and when <= at), set())
        since = max((when for one, when in begun if one == name and when <= at), default=at)
        if any(visit.device in gpus and since - LOOK_S <= visit.at <= at for visit in outcome.visits):
            hit.append(line)
    return hit


def unexplained(outcome: Outcome) -> list[str]:
    """Claims of engines that found no room although no foreigner was to blame."""
    hit = spoilt(outcome)
    return [line for line in outcome.refused if line not in hit and line.split()[1] != "foreign"]


def _seconds(line: str) -> float:
    """When a line of the daemon's log was written."""
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def sizes_gib() -> dict[int, float]:
    return dict.fromkeys(range(GPUS), GPU_GIB)
