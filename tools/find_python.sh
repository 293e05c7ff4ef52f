#!/bin/sh
# Print the path of a Python that spt-jax supports: from PATH, then pyenv's versions, then uv.
suits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' \
        >/dev/null 2>&1
}

for name in python3.12 python3.13 python3 python; do
    path=$(command -v "$name" 2>/dev/null) && suits "$path" && echo "$path" && exit 0
done
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python; do
    [ -x "$path" ] && suits "$path" && echo "$path" && exit 0
done
if command -v uv >/dev/null 2>&1; then
    path=$(uv python find '>=3.12,<3.14' 2>/dev/null) || {
        uv python install 3.12 >&2 && path=$(uv python find 3.12 2>/dev/null)
    }
    [ -n "$path" ] && suits "$path" && echo "$path" && exit 0
fi
cat >&2 <<'MESSAGE'
spt-jax needs Python 3.12 or 3.13 with the venv module; none was found on PATH, under pyenv, or
through uv. Install one, for example with one of
    apt-get install python3.12 python3.12-venv
    pyenv install 3.12
    pip install uv
and run the command again.
MESSAGE
exit 1
