#!/bin/sh
# What start.sh, stop.sh, restart.sh and status.sh share: scripts/service.py in the checkout's own Python.
set -eu
VLLM_SERVER_CALLED_IN=$(pwd)
export VLLM_SERVER_CALLED_IN
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/python ]; then
    echo "vllm-server: nothing is installed here yet: scripts/install.sh" >&2
    exit 1
fi
exec .venv/bin/python -m scripts.service "$@"
