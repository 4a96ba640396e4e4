#!/bin/sh
# Starts the daemon of this checkout:  scripts/start.sh [-d] [-c FILE] [-- OPTIONS OF app.py]
# -d: in the background, and back when it serves or has said why not.  Safe twice.  Exit code 0: it runs.
exec "$(dirname "$0")/service.sh" start "$@"
