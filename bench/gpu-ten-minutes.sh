#!/usr/bin/env bash
# Measures everything on this machine's GPU within 480 s, with what is here and in gpu-wheels/, and without a network.
#   bench/gpu-ten-minutes.sh [--dry-run] [--out DIR] [PHASE...]
# Environment: GPU_PYTHON, a Python with PyTorch and Triton for the GPU [python3].
set -euo pipefail
SECONDS=0
root=$(cd "$(dirname "$0")/.." && pwd)
python=${GPU_PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "there is no Python '$python': set GPU_PYTHON to one with PyTorch and Triton for the GPU" >&2
  exit 2
fi
if ! scratch=$(mktemp -d); then
  echo "there is no folder for temporary files: set TMPDIR to one that can be written" >&2
  exit 2
fi
installing=
ended() {
  [ -z "$installing" ] || kill "$installing" 2>/dev/null || true
  rm -rf "$scratch"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wheels=("$root"/gpu-wheels/*.whl)
if [ -e "${wheels[0]}" ]; then
  # First on the path, so that they go over older versions; what then lacks a package says so instead of its numbers.
  timeout -k 1 60 "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-index --no-deps --no-compile --upgrade --target "$scratch/wheels" "${wheels[@]}" &
  installing=$!
  wait "$installing" || echo "the wheels in gpu-wheels/ are not installed" >&2
else
  echo "there are no wheels in gpu-wheels/: going on with the packages of $python" >&2
fi
# Triton compiles into a folder of the home, which may not be there to write to.
[ -w "${HOME:-/nowhere}" ] || export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
export PYTHONPATH="$scratch/wheels:$root:$root/proto"
export PYTHONSAFEPATH=1 # else the folder that this was started in would go first
# In this shell's place, so that whoever ends the script ends the run; the run removes the folder.
exec "$python" -m bench.gpu.run --scratch "$scratch" --used-s "$SECONDS" "$@"
