"""Where uninstall.sh finds what lies outside the checkout: STATE_DIR and the engine's cache folder, a line each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from config import load_settings
from errors import ConfigError
from instances.store import StateDir
from scripts.setup_engine import cache_folder


def main() -> int:
    """Exit code 1 while a daemon uses the state folder, or when the settings are wrong."""
    try:
        settings = load_settings(os.environ, cwd=Path.cwd())
        if settings.state_dir.exists():
            StateDir(settings.state_dir).lock()
    except (ConfigError, OSError) as error:
        print(f"vllm-server: {error}", file=sys.stderr)
        return 1
    print(settings.state_dir)
    print(cache_folder(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
