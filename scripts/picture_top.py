"""Draw `vllm-server top` as it looks now, for the documents:  python -m scripts.picture_top [URL] [FILE]

In the checkout, with the client's libraries; without arguments the daemon on port 5000, into docs/pictures/top.svg.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "client"))

from vllm_server_client import AsyncVLLMProxyClient  # noqa: E402
from vllm_server_client.top.app import Monitor  # noqa: E402

COLUMNS, ROWS = 100, 24
SETTLED_S = 8.0         # the server samples its engines every 5 seconds


async def draw(url: str) -> str:
    """The picture as SVG.  Raises what the client raises."""
    async with AsyncVLLMProxyClient(url, max_retries=0) as client:
        await client.health()
        monitor = Monitor(client, 1.0)
        async with monitor.run_test(size=(COLUMNS, ROWS)) as pilot:
            await pilot.pause(SETTLED_S)
            drawn = monitor.export_screenshot(title="vllm-server top")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)     # a document loads no fonts from elsewhere


def main(url: str = "http://127.0.0.1:5000", file: str = str(ROOT / "docs" / "pictures" / "top.svg")) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(asyncio.run(draw(url)))
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
