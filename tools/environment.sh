# Makes, or reuses, the Python environment of this checkout. Source it and call `clsa_environment`; owns no
# test, training or CI step. tests/run.sh, examples/quickstart.sh and .ci/run share it:
#
#   source "$root/tools/environment.sh"
#   clsa_environment        # afterwards `python` and `pip` are those of $root/.venv; exits 2 with one line if it cannot
#
# The environment is an editable install with the `dev` extra. `.venv/complete` is written last and holds a
# hash of all that the installation depends on: without it the environment is half made and made anew; with
# another hash (pyproject.toml changed) pip brings it up to date. Concurrent callers wait for one another.

_clsa_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

_clsa_fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# The real path of an interpreter, if "$@" starts a Python 3.12. pyenv's shims exist without one behind them.
_clsa_if_3_12() {
    "$@" -c 'import sys; sys.version_info[:2] == (3, 12) or sys.exit(1); print(sys.executable)' 2>/dev/null
}

_clsa_find_python() {
    _clsa_if_3_12 python3.12 && return
    local version
    if command -v pyenv >/dev/null; then
        for version in $(pyenv versions --bare 2>/dev/null | grep -E '^3\.12(\.|$)' | sort -rV); do
            _clsa_if_3_12 env PYENV_VERSION="$version" python3.12 && return
        done
    fi
    _clsa_if_3_12 python3
}

# What the installed environment depends on: an editable install records the checkout's path.
_clsa_hash() {
    { cat "$_clsa_root/pyproject.toml" "$_clsa_root/setup.py" && echo "$_clsa_root"; } | sha256sum | cut -d ' ' -f 1
}

# Runs a command quietly; shows the end of its output only when it fails.
_clsa_quietly() {
    local log status=0
    log="$(mktemp)"
    "$@" >"$log" 2>&1 || status=$?
    [ "$status" = 0 ] || tail -n 30 "$log" >&2
    rm -f "$log"
    return "$status"
}

_clsa_install() {
    local venv="$_clsa_root/.venv" wanted python started=$SECONDS
    wanted="$(_clsa_hash)"
    if "$venv/bin/python" -c '' 2>/dev/null && [ -f "$venv/complete" ]; then
        [ "$(cat "$venv/complete")" = "$wanted" ] && return
        echo "Updating the environment .venv: pyproject.toml, setup.py or the checkout's path changed." >&2
    else
        python="$(_clsa_find_python)" \
            || _clsa_fail "no Python 3.12 found (tried python3.12, pyenv versions, python3); install one and retry"
        echo "Making the environment .venv with $python: minutes, about 6 GB, once." >&2
        rm -rf "$venv"
        _clsa_quietly "$python" -m venv "$venv" \
            || _clsa_fail "'$python -m venv' failed (its output is above; Debian needs the package python3.12-venv)"
    fi
    rm -f "$venv/complete"
    _clsa_quietly "$venv/bin/python" -m pip install --quiet --editable "$_clsa_root[dev]" \
        || _clsa_fail "pip could not install $_clsa_root[dev] (its output is above)"
    echo "$wanted" >"$venv/complete"
    echo "The environment is ready after $((SECONDS - started)) s." >&2
}

clsa_environment() {
    # The lock is on the folder itself: nothing to leave behind, and it goes when its holder dies.
    (flock 9 && _clsa_install) 9<"$_clsa_root" || exit $?
    export VIRTUAL_ENV="$_clsa_root/.venv"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME
}
