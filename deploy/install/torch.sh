#!/usr/bin/env bash
# Install the build of PyTorch that TORCH selects. The last line printed is `with` or `without`.
#
#   deploy/install/torch.sh CHOICE PIP...     CHOICE is auto, cpu, pypi or none; PIP is the command that installs
#
# PyPI has no Linux build without CUDA: its build of 0.5 GB cannot be imported without 2.2 GB of NVIDIA's libraries.
# PyTorch's own index has a build of 0.2 GB for CPUs.
set -euo pipefail
choice=$1
shift
version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu
output=$(mktemp)
trap 'rm -f "$output"' EXIT

from_pypi() { "$@" "torch==$version" >&2; }

cpu() {
	# On other systems than Linux, PyPI's build is for CPUs.
	if [ "$(uname -s)" != Linux ]; then from_pypi "$@"; return; fi
	# Only PyTorch may come from that index: PyPI cannot have a `+cpu` version. Its dependencies are installed with the others.
	"$@" --quiet --retries 1 --no-deps --extra-index-url $cpu_index "torch==$version+cpu" >"$output" 2>&1
}

case $choice in
cpu)
	cpu "$@" || { cat "$output" >&2; echo "PyTorch $version for CPUs could not be installed from $cpu_index" >&2; exit 1; }
	echo with ;;
pypi) from_pypi "$@"; echo with ;;
none) echo without ;;
auto)
	if [ -e /proc/driver/nvidia/version ]; then from_pypi "$@"; echo with
	elif cpu "$@"; then echo with
	else
		cat >&2 <<-END
			PyTorch's build for CPUs (0.2 GB, $cpu_index) could not be installed:
			  $(grep -m1 -i error "$output" || tail -n1 "$output")
			Continuing without PyTorch: the tests that need it are skipped, and the summary counts them.
			To run them too, set TORCH=pypi, which installs PyPI's build (2.7 GB with NVIDIA's libraries).
		END
		echo without
	fi ;;
*) echo "TORCH=$choice is not one of auto, cpu, pypi, none" >&2; exit 1 ;;
esac
