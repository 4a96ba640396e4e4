"""python client/demo_sync.py [MODEL]: the demo of examples/."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / Path(__file__).name), run_name="__main__")
