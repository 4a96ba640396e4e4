#!/bin/sh
# Stops the daemon that start.sh started:  scripts/stop.sh [-f]
# -f: at once, requests are cut.  Safe twice.  Exit code 0: it does not run any more.
exec "$(dirname "$0")/service.sh" stop "$@"
