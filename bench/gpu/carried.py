"""Check what a GPU run copies to the machine: the sources, and the wheels of the packages in `bench/gpu-carry.txt`.

`bench/gpu-machine.txt` lists the packages that the machine has. `python -m bench.gpu.carried` prints the total size,
and fails if it is above the limit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "gpu-wheels"
CARRY, MACHINE = ROOT / "bench" / "gpu-carry.txt", ROOT / "bench" / "gpu-machine.txt"
BYTES_MAX = 64 << 20


def carried() -> tuple[str, ...]:
    """Return the normalised names of the packages whose wheels are copied."""
    return _names(CARRY)


def machine_has() -> tuple[str, ...]:
    """Return the packages that the machine already has."""
    return _names(MACHINE)


def _names(file: Path) -> tuple[str, ...]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return tuple(line.lower().replace("_", "-") for line in lines if line)


def lacking(wheels: Path) -> list[str]:
    """Return the listed packages without a wheel in the folder."""
    there = {path.name.partition("-")[0].lower().replace("_", "-") for path in wheels.glob("*.whl")}
    return [name for name in carried() if name not in there]


def too_much(tree_bytes: int, wheels_bytes: int) -> str | None:
    """Return an error message if the total size exceeds the limit, otherwise None."""
    both = tree_bytes + wheels_bytes
    if both <= BYTES_MAX:
        return None
    return (
        f"the sources ({tree_bytes / 2**20:.1f} MiB) and the wheels ({wheels_bytes / 2**20:.1f} MiB) "
        f"are {both / 2**20:.1f} MiB; the limit is {BYTES_MAX >> 20} MiB"
    )


def tree_bytes(root: Path = ROOT) -> int:
    """Return the total size in bytes of the files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    files = [root / name.decode() for name in set(listed.split(b"\0")) if name]
    return sum(path.lstat().st_size for path in files if path.exists())


def main() -> int:
    """Run from the command line."""
    missing = lacking(WHEELS)
    if missing:
        print(f"gpu-wheels/ lacks {', '.join(missing)}: run `make gpu-wheels`", file=sys.stderr)
        return 1
    tree, wheels = tree_bytes(), sum(path.stat().st_size for path in WHEELS.iterdir())
    if why := too_much(tree, wheels):
        print(why, file=sys.stderr)
        return 1
    print(f"sources {tree / 2**20:.1f} MiB, wheels {wheels / 2**20:.1f} MiB, of {BYTES_MAX >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
