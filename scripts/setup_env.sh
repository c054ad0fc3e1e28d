#!/bin/sh
# Creates or updates the virtual environment of this repository.
#
#   scripts/setup_env.sh [--dry-run] VENV [EXTRA]
#
# Takes the first Python >= 3.12 with the venv module, on PATH or under pyenv ($PYTHON names another
# one; an environment that exists keeps its own), and installs qserve_jax in editable mode with EXTRA
# and with the CUDA that the NVIDIA driver can run: 13 from driver 580 on, 12 below, none without
# a driver. --dry-run only prints the choice. On failure: exit code 1 and one line that says why.
set -u
cd "$(dirname "$0")/.." || exit 1

fail() { echo "setup_env: $*" >&2; exit 1; }

# Prints "ok" or what is wrong with Python $1; nothing when it cannot run (a shim, say, of a pyenv
# version that is not active).
probe() {
    "$1" -c '
import sys
try:
    import ensurepip, venv
    kit = "ok"
except ImportError:
    kit = "no venv module"
print(kit if sys.version_info >= (3, 12) else "%d.%d" % sys.version_info[:2])
' 2>/dev/null </dev/null
}

# The candidates, one a line: 3.12 first, on which the dependencies have been tried longest.
candidates() {
    for name in python3.12 python3.13 python3.14 python3 python; do command -v $name; done
    versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    for minor in 12 13 14; do
        ls "$versions" 2>/dev/null | grep -x "3\.$minor\.[0-9]*" | sort -t. -k3,3nr |
            while read -r version; do echo "$versions/$version/bin/python"; done
    done
}

find_python() {
    seen=
    while read -r python; do
        found=$(probe "$python")
        [ "$found" = ok ] && echo "$python" && return
        [ -n "$found" ] && seen="$seen, $python ($found)"
    done <<EOF
$(if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else candidates; fi)
EOF
    case $seen in
        "") found=${PYTHON:+"cannot run $PYTHON"} found=${found:-none on PATH or under pyenv} ;;
        *) found="found only ${seen#, }" ;;
    esac
    case $seen in
        *venv*) cure="install its venv module (Debian, Ubuntu: apt install python3-venv)" ;;
        *) cure="install one, or name it: make PYTHON=/path/to/python3.12" ;;
    esac
    fail "Python >= 3.12 with venv is needed, $found; $cure"
}

cuda_extra() {
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    major=${driver%%.*}
    case $major in "" | *[!0-9]*) return 0 ;; esac
    if [ "$major" -ge 580 ]; then echo cuda13; else echo cuda12; fi
}

dry_run=
[ "${1:-}" = --dry-run ] && dry_run=1 && shift
[ $# -ge 1 ] || fail "usage: setup_env.sh [--dry-run] VENV [EXTRA]"
venv=$1

if [ -x "$venv/bin/pip" ]; then
    python=$venv/bin/python
    [ "$(probe "$python")" = ok ] || fail "$venv has no working Python >= 3.12; run: make clean"
else
    python=$(find_python) || exit 1
fi
extras=$(echo "$(cuda_extra) ${2:-}" | xargs | tr ' ' ,)
target=.${extras:+[$extras]}

echo "setup_env: installing $target into $venv with $python"
[ -n "$dry_run" ] && exit 0

log=$venv/pip.log
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" || fail "$python cannot create $venv"
"$venv/bin/python" -m pip install --disable-pip-version-check -e "$target" >"$log" 2>&1 </dev/null ||
    fail "pip failed: $(grep -o 'ERROR.*' "$log" | tail -n 1); is there a network? All it said: $log"
