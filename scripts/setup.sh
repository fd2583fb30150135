#!/usr/bin/env bash
# Sets up the Python environment of the project; `source` it, or run it in advance.
# Uses the active virtual or conda environment; without one, creates .venv in the project folder.
# A stamp in the environment (hash of requirements.txt, version of Python) lets later calls return at once.

_modat_setup() {
    local root requirements prefix stamp wanted candidate
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    requirements="$root/requirements.txt"

    if [ -n "${VIRTUAL_ENV:-}" ]; then
        prefix="$VIRTUAL_ENV"
    elif [ -n "${CONDA_PREFIX:-}" ]; then
        prefix="$CONDA_PREFIX"
    else
        prefix="$root/.venv"
        if [ ! -x "$prefix/bin/python" ]; then
            candidate="$(_modat_find_python)" || return 1
            echo "setup: making $prefix with $("$candidate" -V)" >&2
            "$candidate" -m venv "$prefix" || {
                echo "error: '$candidate -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
                return 1
            }
        fi
    fi
    if [ ! -x "$prefix/bin/python" ]; then
        echo "error: the active environment $prefix has no bin/python; deactivate it or recreate it" >&2
        return 1
    fi
    export VIRTUAL_ENV="$prefix"
    case ":$PATH:" in *":$prefix/bin:"*) ;; *) PATH="$prefix/bin:$PATH" ;; esac
    export PATH
    MODAT_PYTHON="$prefix/bin/python"
    export MODAT_PYTHON

    stamp="$prefix/.modat-requirements"
    wanted="$(_modat_sha256 "$requirements") $("$MODAT_PYTHON" -V 2>&1)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    (
        # Launchers started at the same time must not install concurrently.
        if command -v flock >/dev/null 2>&1; then
            exec 9>"$prefix/.modat-setup.lock" && flock 9
            if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
        fi
        echo "setup: installing $requirements into $prefix (once; some minutes and about 3 GB the first time)" >&2
        if ! "$MODAT_PYTHON" -m pip --version >/dev/null 2>&1; then
            "$MODAT_PYTHON" -m ensurepip --upgrade >&2 || {
                echo "error: $prefix has no pip and ensurepip failed; install pip there, then start again" >&2
                exit 1
            }
        fi
        "$MODAT_PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2 || {
            echo "error: pip could not install $requirements into $prefix (see its output above)" >&2
            exit 1
        }
        # mmengine imports yapf, which writes its grammars to ~/.cache on first import, not atomically: processes started
        # at the same time could read a partial file.
        "$MODAT_PYTHON" -c "import mmengine" >/dev/null 2>&1 || true
        printf '%s\n' "$wanted" >"$stamp.$$" && mv -f "$stamp.$$" "$stamp"
    )
}

# The first interpreter of a supported version; each is run, since a pyenv shim on the PATH may fail.
_modat_find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.10 to 3.13 on the PATH; install one, or activate an environment that has one" >&2
    return 1
}

_modat_sha256() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum "$1" | cut -d' ' -f1
    else
        shasum -a 256 "$1" | cut -d' ' -f1
    fi
}

if ! _modat_setup; then
    # shellcheck disable=SC2317  # `exit` is reached when the file is run and not sourced
    return 1 2>/dev/null || exit 1
fi
