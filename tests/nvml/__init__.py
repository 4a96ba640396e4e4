"""Builds the stand-in for libnvidia-ml.so.1 (nvml.c), once for all processes and outside the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
COMPILER = shutil.which(os.environ.get("CC", "cc"))
NO_COMPILER = f"no C compiler ({os.environ.get('CC', 'cc')}) to build tests/nvml/nvml.c, the stand-in for NVML, with"


def library_folder() -> Path:
    """The folder with the library, for LD_LIBRARY_PATH.  Needs COMPILER."""
    assert COMPILER is not None, NO_COMPILER
    source = SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"vllm-server-nvml-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:16]}"
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        draft = folder / f"{os.getpid()}.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", draft, SOURCE,
                        "-lpthread"], check=True)
        draft.replace(library)
    return folder
