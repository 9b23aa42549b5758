#!/usr/bin/env bash
# Installs, as root, what tests/containers needs: Debian's Docker Engine (not started: the tests start their own), debootstrap for
# look-alikes of base images, and Compose v2 with BuildKit's client. Debian 12 packages only Compose 1: those two plugins come
# from the next Debian, by the same mirror.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "run as root: sudo $0" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
missing=()
command -v dockerd >/dev/null || missing+=(docker.io iptables)
command -v debootstrap >/dev/null || missing+=(debootstrap)
if [ ${#missing[@]} -gt 0 ]; then apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; fi

if ! docker compose version >/dev/null 2>&1 || ! docker buildx version >/dev/null 2>&1; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  mkdir -p "$folder"/{sources,lists/partial,cache/archives/partial}
  mirror=$(apt-get indextargets --format '$(SITE)' 'Codename: bookworm' | head -1)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$folder/sources/next.list"
  apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$folder/sources" -o "Dir::State::lists=$folder/lists"
    -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
  "${apt[@]}" update
  (cd "$folder" && "${apt[@]}" download docker-compose docker-buildx)
  for package in "$folder"/*.deb; do dpkg -x "$package" "$folder/x"; done
  install -D -t /usr/local/lib/docker/cli-plugins "$folder"/x/usr/libexec/docker/cli-plugins/docker-{compose,buildx}
fi
docker compose version
docker buildx version
dockerd --version
