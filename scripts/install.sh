#!/bin/sh
# Makes this checkout ready to start:  scripts/install.sh [--no-engine]
#
# .venv with the daemon and the command vllm-server, vLLM (found, or installed into ~/.cache/vllm-server: some minutes,
# 5 to 15 GiB; --no-engine leaves that out), and configs/config.yaml to write models into.  Safe twice: what is there
# stays.  scripts/uninstall.sh takes it away.
set -eu

say() { echo "vllm-server: $*" >&2; }

engine=yes
for word in "$@"; do
    case $word in
        --no-engine) engine=no ;;
        -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) say "install.sh takes --no-engine, and not $word"; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."

for file in requirements.txt client/requirements.txt; do
    scripts/make_venv.sh "$file"
done
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --force-reinstall ./client || {
    say "pip could not install the command vllm-server (reason above); run this again when that is mended"
    exit 1
}
rm -rf client/build client/*.egg-info
touch .venv/run.stamp       # for make
if [ ! -e config.yaml ] && [ ! -e configs/config.yaml ]; then
    mkdir -p configs
    cp deploy/config.yaml configs/config.yaml
    say "made configs/config.yaml: write your models into it"
fi
if [ $engine = yes ]; then
    say "engine: $(.venv/bin/python scripts/setup_engine.py)"
else
    say "no engine installed: servers on other machines (servers.toml) need none"
fi
say "ready. Next: .venv/bin/vllm-server doctor, then scripts/start.sh -d"
