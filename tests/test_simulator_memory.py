"""The simulator takes and gives back device memory as vLLM does, and never more than there is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from simulation.devices import DeviceFolder, Holding, NoMemory, visible_devices
from tests.simulator_harness import CHAT, Launch, Simulator, launch
from tests.support import wait_until

__all__ = ["launch"]          # a fixture

pytestmark = pytest.mark.whole

GIB = 1 << 30
SIZE_GIB = 80
MODEL = {"weights_mb": 14 * 1024, "overhead_mb": 1024}
FOREIGN = 5_000_000


class World:
    """Two GPUs of 80 GiB, and simulators on them."""

    def __init__(self, path: Path, launch: Launch) -> None:
        self.folder = DeviceFolder(path)
        self._launch = launch
        path.mkdir()
        (path / "devices.json").write_text(json.dumps([
            {"index": index, "total_bytes": SIZE_GIB * GIB, "uuid": f"GPU-{index}abc"} for index in range(2)]))

    def start(self, *flags: str, visible: str = "GPU-0", sim: dict[str, object] | None = None) -> Simulator:
        return self._launch("--enable-sleep-mode", *flags, sim={**MODEL, **(sim or {})},
                            SIMULATOR_MEMORY_DIR=str(self.folder.path), CUDA_VISIBLE_DEVICES=visible,
                            VLLM_SERVER_DEV_MODE="1")

    def hold(self, gib: float, device: int = 0) -> None:
        self.folder.claim(Holding(FOREIGN, int(gib * GIB), (device,), label="foreign", always=True))

    def held(self) -> dict[int, float]:
        with self.folder.locked():
            return {device: held / GIB for device, held in self.folder.held().items()}

    def lines(self, name: str) -> list[str]:
        path = self.folder.path / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def world(launch: Launch, tmp_path: Path) -> World:
    return World(tmp_path / "memory", launch)


def failure(simulator: Simulator) -> str:
    """The cause of a start that fails, as the log has it."""
    assert simulator.process.wait(120) == 1
    cause = [line for line in simulator.out.read_text().splitlines() if " ERROR " in line and "Error: " in line]
    return cause[-1].partition("] ")[2]


# --- what it takes ------------------------------------------------------------------------------------------------

def test_without_a_size_of_its_own_the_cache_fills_what_the_utilization_allows(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.5").ready()
    assert world.held() == {0: 40}
    assert "Available KV cache memory: 25.00 GiB" in simulator.log
    assert "Model loading took 14.00 GiB" in simulator.log
    assert "(80.00/80.00 GiB) on startup. Desired GPU memory utilization is (0.5, 40.00 GiB)" in simulator.log


def test_a_cache_of_given_size_comes_on_top_of_weights_and_overhead(world: World) -> None:
    world.start("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(5 * GIB)).ready()
    assert world.held() == {0: 20}


@pytest.mark.parametrize("more", [(), ("--kv-cache-memory-bytes", str(GIB))])
def test_it_refuses_to_start_when_less_than_its_share_is_free_whatever_it_would_take(
        world: World, more: tuple[str, ...]) -> None:
    world.hold(41)
    simulator = world.start("--gpu-memory-utilization", "0.5", *more)
    assert failure(simulator).startswith("ValueError: Free memory on device cuda:0 (39.00/80.00 GiB) on startup is "
                                         "less than desired GPU memory utilization (0.5, 40.00 GiB)")
    assert len(world.lines("refused")) == 1


def test_each_rank_takes_its_share_of_its_own_device(world: World) -> None:
    simulator = world.start("-tp", "2", "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(5 * GIB),
                            visible="GPU-1,GPU-0").ready()
    assert world.held() == {0: 13, 1: 13}
    family = simulator.family()
    first = next(one for one in world.folder.holdings() if one.pid == family["VLLM::Worker_TP0"].pid)
    assert first.devices == (1,)        # the first of the visible ones


def test_a_device_can_be_named_by_uuid_or_by_index() -> None:
    devices = DeviceFolder(Path("/none")).devices()
    assert visible_devices("3,1", devices) == [3, 1]
    assert visible_devices("GPU-nowhere,1", devices) == []


def test_the_files_of_a_model_tell_its_weights_and_its_cache(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}))
    for part in range(2):
        os.truncate(os.open(model / f"model-{part}.safetensors", os.O_CREAT | os.O_WRONLY), 3 * GIB)
    simulator = world._launch("--gpu-memory-utilization", "0.25", model=str(model),
                              SIMULATOR_MEMORY_DIR=str(world.folder.path)).ready()
    tokens = (20 - 6 - 1) * GIB // (2 * 32 * 8 * 128 * 2)
    assert f"GPU KV cache size: {tokens:,} tokens" in simulator.log


def test_a_context_that_does_not_fit_fails_with_the_length_that_would(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.25", "--max-model-len", "65536",
                            sim={"kv_bytes_per_token": GIB // 4096})
    assert ("To serve at least one request with the model's max seq len (65536), (16.00 GiB KV cache is needed, which "
            "is larger than the available KV cache memory (5.00 GiB). Based on the available memory, the estimated "
            "maximum model length is 20480.") in failure(simulator)


def test_weights_that_leave_nothing_for_the_cache_fail(world: World) -> None:
    assert "No available memory for the cache blocks." in failure(world.start("--gpu-memory-utilization", "0.1"))


def test_weights_that_find_no_room_run_out_of_memory(world: World) -> None:
    world.hold(70)
    simulator = world.start("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(GIB))
    assert failure(simulator).startswith("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB. GPU "
                                         "0 has a total capacity of 80.00 GiB of which 2.00 GiB is free")
    assert world.held() == {0: 70}


# --- with others on the same device -------------------------------------------------------------------------------

def taking(world: World) -> Callable[[], bool]:
    """A start has looked at its device, and takes memory now."""
    return lambda: world.held().get(0, 0) > 30


def test_memory_that_others_free_while_it_profiles_fails_the_start(world: World) -> None:
    world.hold(30)
    simulator = world.start("--gpu-memory-utilization", "0.5", sim={"start_s": 4})
    wait_until(taking(world))
    world.hold(1)
    assert failure(simulator).startswith("AssertionError: Error in memory profiling. Initial free memory 50.00 GiB, "
                                         "current free memory 64.00 GiB.")


def test_a_cache_of_given_size_needs_no_profiling(world: World) -> None:
    world.hold(30)
    simulator = world.start("--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", str(GIB), sim={"start_s": 4})
    wait_until(taking(world))
    world.hold(1)
    simulator.ready()
    assert world.held() == {0: 17}


def test_of_two_that_start_at_once_the_second_fails_and_the_device_is_never_over_its_memory(world: World) -> None:
    flags = ("--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", str(45 * GIB))
    both = [world.start(*flags) for _ in range(2)]
    wait_until(lambda: all("startup complete" in one.log or one.process.poll() is not None for one in both))
    assert sorted(one.process.poll() or 0 for one in both) == [0, 1]
    assert world.held() == {0: 60}
    assert world.lines("overcommitted") == [] and world.lines("refused")


def test_more_than_there_is_is_not_given_to_anybody(world: World) -> None:
    world.hold(70)
    with pytest.raises(NoMemory):
        world.hold(81)
    assert world.held() == {0: 70}
    assert world.lines("overcommitted") == []


# --- asleep -------------------------------------------------------------------------------------------------------

def host_gib(world: World) -> float:
    return sum(one.host_bytes for one in world.folder.holdings()) / GIB


def test_asleep_it_holds_a_rest_and_keeps_its_weights_in_the_hosts_memory(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.5").ready()
    simulator.post("/sleep?level=1&mode=wait")
    assert world.held() == {0: 1} and host_gib(world) == 14
    simulator.post("/wake_up")
    assert world.held() == {0: 40} and host_gib(world) == 0
    simulator.post("/sim", {"sleep_keeps_mb": 3 * 1024})
    simulator.post("/sleep?level=2&mode=wait")
    assert world.held() == {0: 3} and host_gib(world) == 0


def test_after_the_deeper_sleep_it_talks_nonsense_until_its_weights_are_loaded_again(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.5").ready()
    simulator.post("/sleep?level=2&mode=wait")
    assert simulator.post("/wake_up?tags=weights").json()["status"] == "sleeping"
    assert world.held() == {0: 15}
    simulator.post("/wake_up?tags=kv_cache")
    assert world.held() == {0: 40}
    assert "simulated token" not in simulator.post("/v1/chat/completions", CHAT).text
    simulator.post("/collective_rpc", {"method": "reload_weights"})
    assert "simulated token" in simulator.post("/v1/chat/completions", CHAT).text


def test_a_wake_without_room_fails_and_takes_nothing(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.5").ready()
    simulator.post("/sleep?level=1&mode=wait")
    world.hold(50)
    assert simulator.post("/wake_up").status_code == 500
    assert "CUDA Error: out of memory" in simulator.log
    assert world.held() == {0: 51} and simulator.get("/is_sleeping").json() == {"is_sleeping": True}
    world.hold(10)
    assert simulator.post("/wake_up").json()["status"] == "awake"
    simulator.post("/sim", {"wake_fails": True})
    assert simulator.post("/wake_up").status_code == 500


# --- ends ---------------------------------------------------------------------------------------------------------

def test_what_a_dead_process_held_is_free_even_before_anybody_waited_for_it(world: World) -> None:
    simulator = world.start("--gpu-memory-utilization", "0.5").ready()
    server, engine = simulator.process, simulator.family()["VLLM::EngineCore"]
    os.kill(server.pid, signal.SIGSTOP)             # so that nobody waits for the engine
    engine.send_signal(signal.SIGKILL)
    wait_until(lambda: engine.status() == "zombie")
    assert world.held() == {}
    os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_may_free_it_later(world: World, number: signal.Signals) -> None:
    (world.folder.path / "driver").write_text("frees_late_ms 500\n")
    simulator = world.start("--gpu-memory-utilization", "0.5", sim={"engine_death_exit_s": 0}).ready()
    os.kill(simulator.pid if number == signal.SIGTERM else simulator.family()["VLLM::EngineCore"].pid, number)
    simulator.process.wait(120)
    ended = [one for one in world.folder.holdings() if one.ended]
    assert [one.memory_bytes for one in ended] in ([40 * GIB], [])   # a machine that is slow may be past it by now
    wait_until(lambda: world.held() == {})
    assert world.lines("overcommitted") == []
