#!/usr/bin/env bash
# A web page that segments what sounds in a video: bash scripts/demo.sh [options]; --help lists them.
# Gradio is installed on first use, into the folder `demo` of the environment: it asks for other versions of packages
# than the project, which sees them nowhere else. `--install` does only that.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# Makes $VIRTUAL_ENV/demo, an environment that sees the packages of the outer one, and sets DEMO_PYTHON.
modat_demo_setup() {
    local folder="$VIRTUAL_ENV/demo" requirements="$MODAT_ROOT/scripts/demo_page/requirements.txt" wanted
    DEMO_PYTHON="$folder/bin/python"
    wanted="$(cat "$requirements") $("$MODAT_PYTHON" -V)"
    if [ -f "$folder/.modat-requirements" ] && [ "$(cat "$folder/.modat-requirements")" = "$wanted" ]; then
        return 0
    fi
    (
        # Pages started at the same time must not install concurrently.
        if command -v flock >/dev/null 2>&1; then
            exec 9>"$VIRTUAL_ENV/.modat-demo.lock" && flock 9
            if [ -f "$folder/.modat-requirements" ] && [ "$(cat "$folder/.modat-requirements")" = "$wanted" ]; then
                exit 0
            fi
        fi
        echo "demo: installing $requirements into $folder (once; about a minute and 150 MB)" >&2
        "$MODAT_PYTHON" -m venv --clear --without-pip "$folder" && {
            "$MODAT_PYTHON" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
                >"$("$DEMO_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/modat.pth"
        } && "$MODAT_PYTHON" -m pip --python "$DEMO_PYTHON" install --quiet --disable-pip-version-check \
            -r "$requirements" >&2 || {
            echo "error: pip could not install $requirements into $folder (see its output above)" >&2
            exit 1
        }
        printf '%s\n' "$wanted" >"$folder/.modat-requirements"
    )
}

for argument in "$@"; do
    case "$argument" in -h | --help) NNODES=1 modat_launch scripts/demo.py --help ;; esac
done
# shellcheck source=scripts/setup.sh
source "$MODAT_ROOT/scripts/setup.sh"
modat_demo_setup
if [ "${1:-}" = --install ]; then
    exit 0
fi
modat_keep_allocator
modat_set_threads 1
export GRADIO_ANALYTICS_ENABLED=0
exec "$DEMO_PYTHON" "$MODAT_ROOT/scripts/demo.py" "$@"
