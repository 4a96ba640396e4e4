#!/bin/sh
# Takes away what install.sh and the running daemon have made:  scripts/uninstall.sh [--state] [--engine]
#
# Stops the daemon; removes .venv and logs/.  What you wrote (configs/, .env, ...) stays.  --state: also the records and logs
# of the instances (STATE_DIR); --engine: also the vLLM and the demo models in ~/.cache/vllm-server.  Safe twice.
set -eu

say() { echo "vllm-server: $*" >&2; }

state=no engine=no
for word in "$@"; do
    case $word in
        --state) state=yes ;;
        --engine) engine=yes ;;
        -h|--help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) say "uninstall.sh takes --state and --engine, and not $word"; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."

if [ -x .venv/bin/python ]; then
    scripts/stop.sh
    where=$(.venv/bin/python -m scripts.places)     # STATE_DIR and the engine's folder, a line each
    if [ $state = yes ]; then
        rm -rf -- "$(echo "$where" | sed -n 1p)"
    fi
    if [ $engine = yes ]; then
        rm -rf -- "$(echo "$where" | sed -n 2p)"
    fi
elif [ $state$engine != nono ]; then
    say "nothing is installed here any more, so where state and engine are is unknown: remove the folders by hand"
    exit 1
fi
rm -rf .venv logs build client/build client/*.egg-info
find . -name __pycache__ -type d -prune -exec rm -rf {} +
say "removed; the checkout itself is yours to delete"
