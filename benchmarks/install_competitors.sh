#!/usr/bin/env bash
# Installs what `make bench` compares this daemon with.  May be run again at any time: what is there is left alone.
#
#   benchmarks/install_competitors.sh [NAME…]      NAME: nginx caddy vllm-router production-stack litellm mvllm
#
# nginx and Caddy come from Debian (apt-get, as root or through sudo), the others from PyPI, each in a virtual
# environment of its own under ${XDG_CACHE_HOME:-~/.cache}/vllm-server/bench, so that none can disturb another or the
# daemon.  The production stack's router is not on PyPI (the name vllm-router there belongs to the Rust router, which
# is another program), so it is installed from its source: a checkout named by PRODUCTION_STACK_SRC, else git.
#
# One that cannot be installed is named at the end, with exit status 1; the others are installed all the same, and the
# benchmark reports the missing one as "not installed".
set -uo pipefail

VLLM_ROUTER_VERSION=0.1.17
LITELLM_VERSION=1.109.1
MVLLM_VERSION=0.1.0
PRODUCTION_STACK_GIT=https://github.com/vllm-project/production-stack
PRODUCTION_STACK_REF=${PRODUCTION_STACK_REF:-main}

cache=${XDG_CACHE_HOME:-$HOME/.cache}/vllm-server/bench
mkdir -p "$cache"
failed=()

# python_at_least MINOR: the path of the oldest python3 on this machine that is 3.MINOR or newer.
python_at_least() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 "$HOME"/.pyenv/versions/3.*/bin/python3; do
        if "$candidate" -c "import sys, venv; sys.exit(sys.version_info < (3, $1))" 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "no python 3.$1 or newer on this machine" >&2
    return 1
}

# in_venv NAME PROGRAM MINOR REQUIREMENT…: makes the environment and installs, unless PROGRAM is in it already.
in_venv() {
    local venv=$cache/$1 program=$2 minor=$3 python
    shift 3
    if [[ -x $venv/bin/$program ]]; then return 0; fi
    python=$(python_at_least "$minor") || return 1
    rm -rf "$venv"                                  # half an installation is none
    "$python" -m venv "$venv" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

from_debian() {
    if command -v "$1" >/dev/null || [[ -x /usr/sbin/$1 ]]; then return 0; fi
    local sudo=
    if [[ $EUID -ne 0 ]]; then sudo=sudo; fi
    # policy-rc.d's 101 keeps Debian from starting a service that would only hold port 80.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 $sudo apt-get install -y -q --no-install-recommends "$2"
}

install_nginx() { from_debian nginx nginx-light; }
install_caddy() { from_debian caddy caddy; }
install_vllm-router() { in_venv vllm-router vllm-router 9 "vllm-router==$VLLM_ROUTER_VERSION"; }

# LiteLLM pins certifi and its own side packages to releases of the same day, which a mirror may not have yet.  None of
# them matters on loopback without a database, so their newest do: the requirements are read from LiteLLM's metadata
# and installed with those left open.
install_litellm() {
    local venv=$cache/litellm
    if [[ -e $venv/complete ]]; then return 0; fi
    rm -rf "$venv"
    in_venv litellm litellm 10 --no-deps "litellm==$LITELLM_VERSION" || return 1
    "$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON' || return 1
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in requires("litellm"):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": "proxy"}):
        open_ended = wanted.name == "certifi" or wanted.name.startswith("litellm-")
        extras = f"[{','.join(wanted.extras)}]" if wanted.extras else ""
        print(f"{wanted.name}{extras}{'' if open_ended else wanted.specifier}")
PYTHON
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/requirements.txt" || return 1
    touch "$venv/complete"
}
install_mvllm() { in_venv mvllm mvllm 12 "mvllm==$MVLLM_VERSION"; }

install_production-stack() {
    local source=${PRODUCTION_STACK_SRC:-$cache/production-stack.src}
    if [[ -x $cache/production-stack/bin/vllm-router ]]; then return 0; fi
    if [[ ! -d $source ]]; then
        git clone --quiet --depth 1 --branch "$PRODUCTION_STACK_REF" "$PRODUCTION_STACK_GIT" "$source" || return 1
    fi
    in_venv production-stack vllm-router 12 "$source"
}

if [[ $# -eq 0 ]]; then set -- nginx caddy vllm-router production-stack litellm mvllm; fi
for name in "$@"; do
    if ! declare -F "install_$name" >/dev/null; then
        echo "unknown: $name" >&2
        exit 2
    fi
    echo "== $name"
    "install_$name" || failed+=("$name")
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "not installed: ${failed[*]}" >&2
    exit 1
fi
