"""Pictures of the page for the documents: `python -m tests.browser.pictures [FOLDER]` (docs/pictures by default).

They show a box of two simulated GPUs under load.  An hour would be long to wait for: one minute is drawn as one.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route

from tests.browser.chromium import HANG_MS, PHONE, chromium
from tests.daemon import CHECKOUT
from tests.gpu_box import GpuBox
from tests.support import wait_until

DESK, FLAT = {"width": 1200, "height": 750}, {"width": 1200, "height": 500}
SHOTS = (("page-light", DESK, False, "en-US"), ("page-dark", DESK, True, "en-US"),
         ("page-chinese", DESK, False, "zh-CN"), ("page-phone", PHONE, False, "en-US"),
         ("page-phone-dark", PHONE, True, "en-US"))
SECONDS = 62.0
FASTER = 58.0           # than the clock of the charts
LARGEST_BYTES = 150_000


def model(gib: float, *, tokens_per_s: float = 40, first_token_s: float = 0.2, **more: Any) -> dict[str, Any]:
    knobs = {"start_s": 1.5, "tokens_per_s": tokens_per_s, "first_token_s": first_token_s, "prefill_tokens_per_s": 4000}
    sim = knobs | more.pop("sim", {})
    return {"memory_mb": int(gib * 1024), "params": {"max_num_seqs": 32, "additional_config": {"sim": sim}}, **more}


CONFIG = {"models": {
    "Qwen/Qwen3-32B": model(66, tokens_per_s=32, first_token_s=0.35, pinned=True),
    "llama-3.1-8b": model(19, tokens_per_s=90, first_token_s=0.08, model_path="meta-llama/Llama-3.1-8B-Instruct"),
    "mistral-24b": model(44, tokens_per_s=45, sleep=1, model_path="mistralai/Mistral-Small-24B"),
    "coder": model(28, model_path="Qwen/Qwen3-Coder-14B", idle_timeout_seconds=900,
                   sim={"start_s": 600.0}),
    "reranker": model(3, model_path="BAAI/bge-reranker-v2-m3"),
    "vision": model(12, model_path="org/vision-7b", sim={"fail": "kv_cache_too_small", "start_s": 0.2}),
}}
TALK = ("Qwen/Qwen3-32B", "llama-3.1-8b", "llama-3.1-8b", "mistral-24b")


def ask(box: GpuBox, name: str, tokens: int) -> None:
    box.daemon.post("/v1/chat/completions", {"model": name, "max_tokens": tokens, "stream": True, "messages": [
        {"role": "user", "content": "word " * random.randint(5, 400)}]})


@contextmanager
def traffic(box: GpuBox) -> Iterator[None]:
    """Clients that come and go in waves."""
    over = threading.Event()
    began = time.monotonic()

    def client(number: int) -> None:
        dice = random.Random(number)
        while not over.is_set():
            share = (time.monotonic() - began) / SECONDS
            busy = share > 0.08 and number < 3 + 9 * abs((share * 2.3 + 0.2) % 1 - 0.5) * 2
            if busy and not (number % 4 == 3 and not 0.25 < share < 0.7):
                ask(box, TALK[number % 4], dice.randint(12, 60))
            over.wait(dice.uniform(0.1, 0.7))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        over.set()
        for one in threads:
            one.join()


def stretched(route: Route) -> None:
    """/admin/history with its minute drawn out to an hour."""
    answer = route.fetch()
    history = answer.json()
    if history["at"]:
        end = history["at"][-1]
        history["at"] = [end - (end - at) * FASTER for at in history["at"]]
    route.fulfill(response=answer, body=json.dumps(history))


def open_page(browser: Browser, box: GpuBox, size: dict[str, int], *, dark: bool = False, language: str = "en-US",
              view: str = "overview") -> Page:
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light", locale=language,  # type: ignore[arg-type]
                                  device_scale_factor=1)
    context.set_default_timeout(HANG_MS)
    page = context.new_page()
    page.route("**/admin/history*", stretched)
    page.goto(f"http://127.0.0.1:{box.daemon.port}/#/{view}")
    page.locator(".link.is-live").wait_for()
    return page


def chat(page: Page) -> None:
    page.get_by_role("link", name="Playground").click()
    page.locator("#play-model").select_option("llama-3.1-8b")
    page.locator("#play-max").fill("60")
    page.locator("#prompt").fill("What does one daemon for many models save me?")
    page.keyboard.press("Enter")
    page.locator("article.model .figures").wait_for()


def take(page: Page, folder: Path, name: str) -> None:
    path = folder / f"{name}.png"
    page.screenshot(path=path)
    print(f"{path}  {path.stat().st_size} bytes{'  TOO LARGE' if path.stat().st_size > LARGEST_BYTES else ''}")  # noqa: T201


@contextmanager
def world() -> Iterator[GpuBox]:
    with tempfile.TemporaryDirectory(prefix="pic", dir="/tmp") as folder, GpuBox(
            Path(folder) / "box", [80.0, 80.0], config=CONFIG, patch={"web.figures.EVERY_S": 0.125}) as box:
        yield box
        box.daemon.remove()


def prepare(box: GpuBox) -> None:
    for name in ("Qwen/Qwen3-32B", "llama-3.1-8b", "mistral-24b"):
        box.daemon.post(f"/admin/models/{name}/load", {"wait": True})
    box.daemon.post("/admin/models/vision/load", {"wait": True})
    box.hold(1, 3.5)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with world() as box, chromium() as browser:
        prepare(box)
        with traffic(box):
            threading.Event().wait(SECONDS - 8)
            for one in box.daemon.instances():
                if one["configured_as"] == "mistral-24b":
                    box.daemon.post(f"/instances/{one['id']}/sleep", {"wait": True})
            box.daemon.post("/admin/models/coder/load", {})
            wait_until(lambda: any(one["status"] == "starting" for one in box.daemon.instances()))
            threading.Event().wait(8)
            for name, size, dark, language in SHOTS:
                page = open_page(browser, box, size, dark=dark, language=language)
                page.wait_for_timeout(1500)
                take(page, folder, name)
                if name == "page-light":
                    chat(page)
                    page.set_viewport_size(FLAT)    # type: ignore[arg-type]
                    take(page, folder, "page-playground")
                    page.get_by_role("link", name="Activity").click()
                    page.wait_for_timeout(500)
                    take(page, folder, "page-activity")
                    page.get_by_role("link", name="Logs").click()
                    page.locator("#log .line").first.wait_for()
                    take(page, folder, "page-logs")
                page.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "docs" / "pictures")
