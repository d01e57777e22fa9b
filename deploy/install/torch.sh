#!/usr/bin/env bash
# Install the PyTorch that TORCH asks for, and say which it is: the last line is `with` or `without`.
#
#   deploy/install/torch.sh CHOICE PIP...     CHOICE is auto, cpu, pypi or none; PIP is the command that installs
#
# PyPI has no build for Linux without CUDA: its 0.5 GB need 2.2 GB of NVIDIA's libraries to be imported at all.
# PyTorch's own index has one of 0.2 GB.
set -euo pipefail
choice=$1
shift
version=$(sed -n 's/^torch==//p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu
said=$(mktemp)
trap 'rm -f "$said"' EXIT

from_pypi() { "$@" "torch==$version" >&2; }

cpu() {
	# Elsewhere than on Linux, PyPI's build is one for CPUs.
	if [ "$(uname -s)" != Linux ]; then from_pypi "$@"; return; fi
	# Only this package may come from there: a version with `+cpu` cannot be on PyPI, and its needs come with the others'.
	"$@" --quiet --retries 1 --no-deps --extra-index-url $cpu_index "torch==$version+cpu" >"$said" 2>&1
}

case $choice in
cpu)
	cpu "$@" || { cat "$said" >&2; echo "PyTorch $version for CPUs could not be had from $cpu_index" >&2; exit 1; }
	echo with ;;
pypi) from_pypi "$@"; echo with ;;
none) echo without ;;
auto)
	if [ -e /proc/driver/nvidia/version ]; then from_pypi "$@"; echo with
	elif cpu "$@"; then echo with
	else
		cat >&2 <<-END
			PyTorch's build for CPUs (0.2 GB, $cpu_index) cannot be had here:
			  $(grep -m1 -i error "$said" || tail -n1 "$said")
			Going on without PyTorch: the tests that need it are skipped, and the summary counts them.
			To run them too: TORCH=pypi installs PyPI's build (2.7 GB with NVIDIA's libraries).
		END
		echo without
	fi ;;
*) echo "TORCH=$choice is none of auto, cpu, pypi, none" >&2; exit 1 ;;
esac
