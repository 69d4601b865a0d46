# Sourced by the other scripts: changes to the project's folder and makes .venv from requirements.txt.
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

clear=
.venv/bin/python -c '' 2> /dev/null || clear=--clear # there is no .venv, or its Python is gone
if [[ -n $clear ]] || ! cmp -s requirements.txt .venv/requirements.installed; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        echo "error: $python is missing or older than Python 3.11; name another one: PYTHON=python3.12 bash $0" >&2
        exit 2
    fi
    echo "installing requirements.txt into .venv ..."
    if ! "$python" -m venv $clear .venv; then
        echo "error: $python cannot make .venv (on Debian: apt install python3-venv)" >&2
        exit 1
    fi
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; then
        echo "error: pip could not install requirements.txt into .venv; see above, then run this again" >&2
        exit 1
    fi
    cp requirements.txt .venv/requirements.installed
fi
