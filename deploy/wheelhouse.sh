#!/usr/bin/env bash
# Collect everything that a machine without a network needs to install fedgex.
#
#   deploy/wheelhouse.sh FOLDER [PIP OPTION...]
#
# FOLDER (new or empty) gets a wheel of fedgex and of each package it needs, in the
# versions of constraints.txt; requirements.txt with their hashes; the systemd units; and
# SHA256SUMS over all of it. The wheels fit machines like this one: same system, same
# processor, same Python (PYTHON names another one). Options go to pip: for torch without
# CUDA, --extra-index-url https://download.pytorch.org/whl/cpu
set -euo pipefail
folder=${1:?usage: deploy/wheelhouse.sh FOLDER [PIP OPTION...]}
shift
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
(cd "$deploy/.." && cp -R client common server simulations pyproject.toml README.md LICENSE "$source")
"$python" -m pip wheel --wheel-dir "$folder" --constraint "$deploy/constraints.txt" "$@" "$source"

cp "$deploy"/systemd/*.service "$folder"
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
