#!/bin/sh
# Makes .venv, or brings it up to date, with what a requirements file lists:  scripts/make_venv.sh FILE [PIP OPTION...]
#
# PYTHON names the interpreter; without it the first of python3, python3.14 ... python3.11 is taken that is 3.11 or
# newer and can make virtual environments (Debian and Ubuntu have that part in a package of its own).
set -eu

say() { echo "vllm-server: $*" >&2; }

# One word: good, no-venv or old; nothing where the command does not run.
judge() {
    "$1" -c 'import sys
if sys.version_info < (3, 11):
    print("old")
else:
    try:
        import ensurepip, venv
        print("good")
    except ImportError:
        print("no-venv")' 2>/dev/null || true
}

find_python() {
    unfit=""
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        verdict=$(judge "$candidate")
        [ "$verdict" = good ] && { echo "$candidate"; return; }
        [ "$verdict" = no-venv ] && unfit=${unfit:-$candidate}
    done
    if [ -n "$unfit" ]; then
        version=$("$unfit" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say "$unfit cannot make virtual environments; on Debian and Ubuntu: apt install python$version-venv"
    else
        say "Python 3.11 or newer is needed and ${PYTHON:-python3} is none (on Ubuntu 22.04: apt install" \
            "python3.11-venv); PYTHON=/path/to/python make ... names another one"
    fi
    return 1
}

if [ "$(judge .venv/bin/python)" != good ]; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
file=$1
shift
say "installing $file into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r "$file" "$@" || {
    say "pip could not install $file (reason above); run this again when that is mended"
    exit 1
}
