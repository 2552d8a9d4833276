#!/bin/sh
# Make .venv with everything that Hone needs. Usage: deploy/install.sh [cpu|gpu]
# Needs python3 >= 3.11 and a package index; pip's own index and find-links settings are honoured.
set -eu
cd "$(dirname "$0")/.."
engine=${1:-cpu}
python=${PYTHON:-python3}
venv=.venv

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Hone needs Python 3.11 or newer; $python is $("$python" -V). Set PYTHON=..." >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9' 2>/dev/null ||
    "$venv/bin/python" -m pip install 'uv>=0.9'

# uv reads no pip settings of its own accord.
pip_setting() {
    "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null ||
        "$venv/bin/python" -m pip config get "install.$1" 2>/dev/null || true
}
find_links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
[ -z "$find_links" ] || export UV_FIND_LINKS="$find_links"
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"

backend=""
if [ "$engine" = cpu ] && ! ls $find_links/torch-*+cpu-*.whl >/dev/null 2>&1; then
    backend="--torch-backend=cpu" # PyTorch's own index for CPU builds
fi

overrides=""
[ "$engine" = gpu ] || overrides="--override deploy/overrides.txt"
# shellcheck disable=SC2086 # empty options must vanish
"$venv/bin/python" -m uv pip install --python "$venv/bin/python" --compile-bytecode $backend \
    --constraint deploy/constraints.txt $overrides --editable ".[$engine,demo,dev]"
