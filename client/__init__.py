"""`from client import VLLMProxyClient` in a checkout.  Elsewhere: pip install ./client, and vllm_server_client."""

import sys
from pathlib import Path

# One module under one name, however it is imported: `except` finds the same classes.
if (folder := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.insert(0, folder)

from vllm_server_client import *  # noqa: F403
from vllm_server_client import __all__ as __all__
