"""Check the wheel: build it, install it into a fresh environment on each Python, and run the demo there.

python -m deploy.install.wheel

The demo uses generated users here, so only packages are downloaded. It must rank with the native encoder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.install.resolve import CONSTRAINTS, PYTHONS, ROOT, clean_environment, interpreter_of
from tests.ranker.interactions import write_atomic

TIMEOUT_S = 600


class BrokenWheelError(Exception):
    """The wheel cannot be installed, or it does not rank; the message has the output."""


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT])
        (wheel,) = folder.glob("pinrank-*.whl")
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        # The demo may use its own files and the installed wheel, but nothing else of the repository.
        shutil.copytree(ROOT / "deploy" / "demo", folder / "deploy" / "demo")
        write_atomic(folder / "cache" / "pinrank" / "ml-1m", name="ml-1m")
        for python in PYTHONS:
            try:
                print(f"Python {python}: {checked(python, wheel, folder)}", flush=True)
            except BrokenWheelError as error:
                failed += 1
                print(f"Python {python}: FAILED\n{error}", flush=True)
    return int(failed > 0)


def checked(python: str, wheel: Path, folder: Path) -> str:
    """Install the wheel on a Python and run the demo; return the result as a sentence. Raises BrokenWheelError."""
    if (interpreter := interpreter_of(python)) is None:
        raise BrokenWheelError(f"Python {python} with pip is not installed here; install it, or add it with pyenv")
    environment, index = clean_environment()
    home = folder / python
    uv = str(Path(sys.executable).with_name("uv"))
    chosen = ["--default-index", index] if index else []
    run([uv, "venv", "--quiet", "--no-config", "--python", interpreter, str(home)], environment)
    install = [uv, "pip", "install", "--quiet", "--no-config", "--constraints", str(CONSTRAINTS), *chosen]
    run([*install, "--python", str(home / "bin" / "python"), f"{wheel}[data]"], environment)
    started = [str(home / "bin" / "python"), "-m", "deploy.demo.demo", "--once", "--grpc-port", "0", "--http-port", "0"]
    own = {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"}
    shown = run(started, environment | own, folder)
    native = "from kernels.encoder import instruction_sets; print(*instruction_sets())"
    widest = run([home / "bin" / "python", "-c", native], environment, folder / "cache").split()[-1:]
    if "degraded: nothing" not in shown or not widest:
        raise BrokenWheelError(
            f"the demo's ranking is degraded, or the native encoder is missing ({widest or 'none'}):\n{shown}"
        )
    shutil.rmtree(folder / "cache" / "pinrank" / "demo")
    return f"installs from the index, and ranks with the native encoder ({widest[0]})"


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in command], env=environment or dict(os.environ), cwd=folder,
            capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BrokenWheelError(f"{command[0]} did not finish within {TIMEOUT_S} s") from error
    if done.returncode:
        raise BrokenWheelError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
