#!/bin/sh
# Shows whether the daemon of this checkout serves:  scripts/status.sh [-v]
# -v: models, instances and devices too.  Exit code 0: it serves, 1: it is in trouble, 3: it does not run.
exec "$(dirname "$0")/service.sh" status "$@"
