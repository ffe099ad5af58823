#!/usr/bin/env bash
# Makes a virtual environment with the first Python that is new enough:
# tools/make_venv.sh FOLDER
set -euo pipefail
for python in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$python" -m venv "$1"
  fi
done
echo "imgcore: no Python 3.11 or newer was found; set PYTHON to one" >&2
exit 1
