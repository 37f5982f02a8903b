#!/usr/bin/env bash
# Check units, Dockerfiles, compose file and scripts with the tools that are installed,
# and say which are not. BIN is the folder of fedgex's commands.
set -euo pipefail
bin=$(realpath "${1:?usage: deploy/check.sh BIN}")
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

has() {
    command -v "$1" >/dev/null || { echo "deploy/$2 not checked: $1 is not installed"; return 1; }
}

if has systemd-analyze systemd; then
    # A unit is refused if its command does not exist; here it lies elsewhere.
    for unit in systemd/*.service; do
        sed "s|/opt/fedgex/bin|$bin|" "$unit" >"$scratch/${unit##*/}"
    done
    systemd-analyze verify "$scratch"/*.service
    echo "deploy/systemd checked"
fi
if has hadolint docker; then
    hadolint docker/Dockerfile.*
    echo "deploy/docker checked"
fi
if has shellcheck "*.sh"; then
    shellcheck ./*.sh
    echo "deploy/*.sh checked"
fi
