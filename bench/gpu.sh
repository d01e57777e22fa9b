#!/usr/bin/env bash
# `make bench-gpu`: measures on this machine's GPU with what is there and what lies in gpu-wheels/, and needs no network.
# Environment: GPU_PYTHON, a Python with PyTorch and Triton for the GPU [python3]. Arguments go to `python -m bench.gpu`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${GPU_PYTHON:-python3}
if [ -d gpu-wheels ]; then
  # Beside the Python that is there, which keeps its own packages; one by one, so that one that does not fit stops no other.
  "$python" -m venv --system-site-packages --without-pip .venv-gpu
  # Without this a virtual environment's Python would not see the packages of another one that made it.
  "$python" -c 'import site, sys; print("\n".join(site.getsitepackages()))' \
    > "$(.venv-gpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
  pip=("$python" -m pip --python .venv-gpu/bin/python install --quiet --disable-pip-version-check
    --no-index --no-deps --no-build-isolation --find-links gpu-wheels)
  sed 's/#.*//' bench/gpu-carry.txt | while read -r name; do
    [ -z "$name" ] || "${pip[@]}" "$name" || echo "left out: $name" >&2
  done
  for name in pytools siphash24 platformdirs mako markupsafe pycuda; do  # a source, built here against this CUDA
    "${pip[@]}" "$name" || echo "left out: $name" >&2
  done
  python=.venv-gpu/bin/python
fi
PYTHONPATH=.:proto exec "$python" -m bench.gpu "$@"
