#!/usr/bin/env bash
# Prints the path of promtool, Prometheus' own checker of metrics and configurations: from PATH, from the cache folder
# ($VLLM_SERVER_CACHE, else ~/.cache/vllm-server), or out of Debian's package `prometheus`, which is fetched into that
# folder and not installed.  Needs no root.  Exit code 1 where it cannot be had.
set -euo pipefail

if command -v promtool; then
    exit 0
fi
cache=${VLLM_SERVER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-server}
tool=$cache/promtool/promtool
if [[ ! -x $tool ]]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "promtool is not on PATH, and this is no Debian or Ubuntu to fetch it from" >&2
        exit 1
    fi
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/promtool.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    # Without lists there is no package: root can get them.
    if ! apt-get download prometheus >apt.log 2>&1; then
        if [[ $EUID -ne 0 ]] || ! { apt-get update && apt-get download prometheus; } >apt.log 2>&1; then
            echo "the package prometheus could not be fetched: $(tail -n 1 apt.log)" >&2
            exit 1
        fi
    fi
    dpkg-deb -x prometheus_*.deb package
    mkdir -p "$(dirname "$tool")"
    mv package/usr/bin/promtool "$tool"
fi
echo "$tool"
