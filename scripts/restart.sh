#!/bin/sh
# Stops the daemon and starts it in the background, with the options of before:  scripts/restart.sh [-f] [-c FILE]
# With KEEP_INSTANCES=true its models stay loaded.
exec "$(dirname "$0")/service.sh" restart "$@"
