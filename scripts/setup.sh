#!/usr/bin/env bash
# Sets up everything that `make demo` and `make test` need: system libraries (apt, as root or by sudo) and a Python environment in .venv.
# Usage: scripts/setup.sh [all|dev|libero]
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-all}
stamp=.venv/.installed-$extra
wanted=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
  echo "Python 3.11 is needed (Triton's Python backend is built for it); set PYTHON=/path/to/python3.11" >&2; exit 1; }

# OSMesa renders the simulator without a display; Triton's Python backend needs libpython3.11 as a shared library.
packages=(libosmesa6 libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libglib2.0-0 libpython3.11)
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3.11-venv)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || dpkg-query -W -f='${Status}' "${package}t64" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  sudo=
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo="sudo -n"; else
      echo "These packages are missing and there is no root or sudo to install them. Run: apt-get install ${missing[*]}" >&2; exit 1
    fi
  fi
  echo "Installing system packages: ${missing[*]}"
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "Installing Python packages into .venv (several minutes the first time)"
.venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extra]"
if [ "$extra" != all ]; then  # see [dependency-groups] in pyproject.toml
  .venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["libero"], sep="\n")' |
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r /dev/stdin
fi
if [ "$extra" = dev ]; then  # tests that miss one of these say so and are skipped
  if [ ! -x .venv/bin/promtool ]; then  # the two programs alone: the Debian package would start a server that all machines reach
    echo "Fetching Prometheus"
    folder=$(mktemp -d)
    (cd "$folder" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } 2>/dev/null) &&
      dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C .venv --strip-components=2 ./usr/bin/prometheus ./usr/bin/promtool ||
      echo "No Prometheus from apt: tests of rules and dashboards will be skipped" >&2
    rm -rf "$folder"
  fi
  # checkov wants other versions of what we have: an environment of its own
  "$python" -m venv .venv/checkov
  .venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["checkov"], sep="\n")' |
    .venv/checkov/bin/python -m pip install -q --disable-pip-version-check -r /dev/stdin ||
    echo "No checkov: its test will be skipped" >&2
fi
echo "$wanted" > "$stamp"
