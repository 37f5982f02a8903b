#!/usr/bin/env bash
# Collect everything that a machine without a network needs to install fedgex.
#
#   deploy/wheelhouse.sh site|server|all FOLDER [PIP OPTION...]
#
# FOLDER (new or empty) gets a wheel of fedgex and of each package it needs, in the
# versions of constraints.txt; requirements.txt with their hashes; the systemd units; and
# SHA256SUMS over all of it. The wheel of fedgex holds `client` and `common` for a site,
# `server` and `common` for the server, everything for all. The wheels fit machines like
# this one: same system, same processor, same Python (PYTHON names another one). Options
# go to pip: for torch without CUDA, --extra-index-url https://download.pytorch.org/whl/cpu
set -euo pipefail
usage="usage: deploy/wheelhouse.sh site|server|all FOLDER [PIP OPTION...]"
part=${1:?$usage}
folder=${2:?$usage}
shift 2
case $part in
site) sides=(client common) units=(fedgex-site) ;;
server) sides=(server common) units=(fedgex-server) ;;
all) sides=(client common server simulations) units=(fedgex-site fedgex-server) ;;
*)
    echo "Error: there is no wheelhouse for \"$part\"; $usage" >&2
    exit 2
    ;;
esac
deploy=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

mkdir -p "$folder"
if [ -n "$(ls -A "$folder")" ]; then
    echo "Error: $folder is not empty; choose a new folder." >&2
    exit 1
fi

# A copy, because a build folder of earlier days would go into the wheel.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
(cd "$deploy/.." && cp -R "${sides[@]}" setup.py pyproject.toml README.md LICENSE "$source")
"$python" -m pip wheel --wheel-dir "$folder" --constraint "$deploy/constraints.txt" "$@" "$source"

for unit in "${units[@]}"; do
    cp "$deploy/systemd/$unit.service" "$folder"
done
cd "$folder"
for wheel in *.whl; do
    IFS=- read -r name version _ <<<"$wheel"
    echo "$name==$version --hash=sha256:$(sha256sum "$wheel" | cut -d ' ' -f 1)"
done >requirements.txt
sha256sum -- * >"$source/SHA256SUMS"
mv "$source/SHA256SUMS" .

cat <<EOF
$folder: $(find . -name '*.whl' | wc -l) wheels for $("$python" --version) on $(uname -sm).
Compare the sum of SHA256SUMS by another way than the one the folder takes:
  $(sha256sum SHA256SUMS | cut -d ' ' -f 1)
On the other machine, in the folder:
  sha256sum --check --quiet SHA256SUMS
  python3 -m venv /opt/fedgex
  /opt/fedgex/bin/pip install --no-index --find-links . --require-hashes --requirement requirements.txt
EOF
