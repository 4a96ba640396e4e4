#!/usr/bin/env bash
# A stranger's path, from a clone to its removal, each step's exit code and output checked:
#
#   scripts/stranger.sh [--simulated] [FOLDER]
#
# Clones this checkout into FOLDER (a new temporary one; what the steps showed stays there in shown/), installs it,
# starts it, loads a model, chats, looks at monitor and page, puts the model to sleep, stops and uninstalls. With the real
# engine (found or installed) or, with --simulated, with the simulator. Ports: a free one, and from VLLM_BASE_PORT on.
set -euo pipefail

engine=real folder=""
for word in "$@"; do
    case $word in
        --simulated) engine=simulated ;;
        -*) echo "stranger.sh takes --simulated and a folder, and not $word" >&2; exit 2 ;;
        *) folder=$word ;;
    esac
done
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath "${folder:-$(mktemp -d -t vllm-server-stranger.XXXXXX)}")
clone=$folder/clone shown=$folder/shown
mkdir -p "$shown"
unset VLLM_SERVER_URL VLLM_SERVER_API_KEY VLLM_COMMAND
terminal="tmux -f /dev/null -L stranger-$$"

step() { echo "==> $SECONDS s  $*"; }
fail() { echo "==> FAILED: $*" >&2; exit 1; }

expect() {      # expect NAME CODE WORDS COMMAND...: its exit code, and that it shows these words
    local name=$1 code=$2 words=$3 got=0
    shift 3
    "$@" >"$shown/$name" 2>&1 </dev/null || got=$?
    [[ $got -eq $code ]] || { cat "$shown/$name" >&2; fail "$name: exit code $got, not $code ($*)"; }
    grep -qE "$words" "$shown/$name" || { cat "$shown/$name" >&2; fail "$name: nothing like '$words' ($*)"; }
    step "$name: exit code $got, $(grep -oE "$words" "$shown/$name" | head -1)"
}

screen() {      # screen NAME WORDS: until the terminal shows them
    local deadline=$((SECONDS + 600))
    until $terminal capture-pane -p >"$shown/$1" && grep -qE "$2" "$shown/$1"; do
        ((SECONDS < deadline)) || { cat "$shown/$1" >&2; fail "$1: nothing like '$2' on the screen"; }
        sleep 0.1
    done
    step "$1: $(grep -oE "$2" "$shown/$1" | head -1)"
}

clean_up() {
    $terminal kill-server 2>/dev/null || true
    if [[ -x $clone/.venv/bin/python ]]; then
        "$clone/scripts/stop.sh" -f >/dev/null 2>&1 || true
    fi
}
trap clean_up EXIT

step "clone of $checkout, with the $engine engine, in $folder"
if git -C "$checkout" rev-parse --verify -q HEAD >/dev/null; then
    git clone -q "$checkout" "$clone"
else
    mkdir "$clone" && tar -C "$checkout" --exclude=./.venv -c . | tar -C "$clone" -x    # an unpacked archive
fi
cd "$clone"

install=(scripts/install.sh)
[[ $engine = real ]] || install+=(--no-engine)
expect install 0 'ready\. Next' "${install[@]}"
expect install-again 0 'ready\. Next' "${install[@]}"

cat >.env <<END
APP_HOST=127.0.0.1
APP_PORT=0
STATE_DIR=$folder/state
VLLM_BASE_PORT=${VLLM_BASE_PORT:-9000}
END
if [[ $engine = simulated ]]; then
    echo "VLLM_COMMAND='$clone/.venv/bin/python $clone/simulator.py'" >>.env
    export SIMULATOR_START_S=5      # there is something to see while it loads
fi
model=$(.venv/bin/python scripts/make_models.py tiny-llama "$folder/tiny-llama")
cat >configs/config.yaml <<END
models:
  demo:
    model_path: $model
    params: {max_model_len: 512, dtype: float32, enforce_eager: true}
    env: {VLLM_CPU_KVCACHE_SPACE: "1", HF_HUB_OFFLINE: "1"}
    sleep: 1
END

vllm_server=$clone/.venv/bin/vllm-server
expect doctor 0 'read without a mistake; .*config.yaml' "$vllm_server" doctor --offline
expect status-before 3 'not running' scripts/status.sh
expect start 0 'serves on http://[0-9.:]+' scripts/start.sh -d
VLLM_SERVER_URL=$(grep -oE 'http://[0-9.:]+' "$shown/start")
export VLLM_SERVER_URL
expect start-again 0 'runs already' scripts/start.sh -d
expect models 0 'demo.*unloaded' "$vllm_server" models

if command -v tmux >/dev/null; then     # with a terminal, and what it shows meanwhile
    $terminal new-session -d -x 100 -y 30 "$vllm_server load demo; echo exit=\$?; exec cat"
    screen load-progress 'loading weights|[1-9][0-9]*%'
    screen load 'exit=0'
    $terminal kill-server
else
    expect load 0 'ready' "$vllm_server" load demo
fi
expect loaded 0 'demo.*ready' "$vllm_server" ps
expect chat 0 '"content": ?"[^"]*[a-z]{3}' "$vllm_server" --json chat demo -t 0 -m 24 "Hello, who are you?"
expect curl 0 '"choices"' curl -fsS "$VLLM_SERVER_URL/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}'

if command -v tmux >/dev/null; then
    $terminal new-session -d -x 100 -y 30 "$vllm_server top; echo exit=\$?; exec cat"
    screen top '1 of 1 ready'
    $terminal send-keys q
    screen top-ends 'exit=0'
    $terminal kill-server
else
    step "top: left out, tmux is not installed (apt install tmux)"
fi
expect page 0 '<!doctype html>' curl -fsS "$VLLM_SERVER_URL/"
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [[ -n $chromium ]]; then     # with eight seconds of the page's own time, until it has its figures
    browse=(timeout 300 "$chromium" --headless --no-sandbox --disable-gpu --window-size=1280,900
            --virtual-time-budget=8000 "--user-data-dir=$folder/chromium")
    expect page-shows 0 '1 of 1 ready' "${browse[@]}" --dump-dom "$VLLM_SERVER_URL/"
    expect page-picture 0 'bytes written to file' "${browse[@]}" "--screenshot=$shown/page.png" "$VLLM_SERVER_URL/"
else
    step "page-picture: left out, chromium is not installed (apt install chromium)"
fi

expect sleep 0 'asleep|sleeping' "$vllm_server" sleep demo
expect sleeps 0 'demo.*sleeping' "$vllm_server" ps
expect wakes-for-a-chat 0 '"content": ?"[^"]*[a-z]{3}' "$vllm_server" --json chat demo -t 0 -m 8 "Again"
expect status 0 'demo +(ready|sleeping)' scripts/status.sh -v
expect stop-model 0 'stopped' "$vllm_server" stop demo
expect stop 0 'stopped' scripts/stop.sh
expect status-after 3 'not running' scripts/status.sh
expect uninstall 0 'removed' scripts/uninstall.sh --state

for gone in .venv logs "$folder/state"; do
    [[ ! -e $gone ]] || fail "uninstall has left $gone"
done
if [[ -d .git ]]; then
    left=$(git status --porcelain)
    [[ -z $left ]] || fail "uninstall has left: $left"
fi
[[ -e configs/config.yaml && -e .env ]] || fail "uninstall took what its owner wrote"
step "all passed; what each step showed: $shown"
