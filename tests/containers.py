"""Runs a command as in a container, without a container engine: as another user, with read-only or full mounts."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: The user id of the Dockerfile. The machine that runs the tests has no such user.
USER = 10001


@dataclass(frozen=True)
class Container:
    """The user and mounts that a command runs with.

    Attributes:
        read_only: folders that are mounted read-only, as with `docker run -v FOLDER:FOLDER:ro`.
        full: folders that are copied to a volume of their own without a free block.
        root_read_only: whether the root is read-only, as with `docker run --read-only`.
        user: the user and group id.
        environment: environment variables to add.
    """

    read_only: Sequence[Path] = ()
    full: Sequence[Path] = ()
    root_read_only: bool = False
    user: int = USER
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, *command: str, folder: Path, **options):
        """Start a command in its own mount namespace, and kill it when the block ends; its mounts vanish with it."""
        skip_without_namespaces()
        with tempfile.TemporaryDirectory() as stage:
            Path(stage).chmod(0o755)
            script = self._script([sys.base_prefix, sys.prefix, str(ROOT), str(folder)], Path(stage))
            environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", **self.environment}
            full_command = ["unshare", "--mount", "sh", "-euc", script, "container", *command]
            with subprocess.Popen(full_command, env=environment, text=True, **options) as process:
                try:
                    yield process
                finally:
                    process.kill()

    def run(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.running(*command, folder=folder, **streams) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _script(self, needed: Sequence[str], stage: Path) -> str:
        lines = ["mount --make-rprivate /"]
        # The user must reach Python, this code and the folder, even if it may not read their parent folders.
        for i, path in enumerate(needed):
            lines += [f"mkdir {stage}/{i}", f"mount --bind {shlex.quote(path)} {stage}/{i}"]
        closed = {parent for path in needed for parent in Path(path).parents if not parent.stat().st_mode & 0o001}
        for parent in sorted(closed, key=lambda p: len(p.parts)):
            if not closed & set(parent.parents):
                lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(parent))}"]
        for i, path in enumerate(needed):
            if closed & set(Path(path).parents):
                lines += [f"mkdir -p {shlex.quote(path)}", f"mount --bind {stage}/{i} {shlex.quote(path)}"]
        for i, volume in enumerate(self.full):
            quoted, kept = shlex.quote(str(volume)), f"{stage}/kept-{i}"
            lines += [
                f"mkdir {kept}", f"cp -a --sparse=always {quoted}/. {kept}",
                f"mount -t tmpfs -o size=1m,mode=777 none {quoted}", f"cp -a --sparse=always {kept}/. {quoted}",
                f"cat /dev/zero > {quoted}/.fills 2>/dev/null || true",
            ]  # fmt: skip
        for volume in self.read_only:
            quoted = shlex.quote(str(volume))
            lines += [f"mount --bind {quoted} {quoted}", f"mount -o remount,bind,ro {quoted}"]
        if self.root_read_only:
            lines += ["mount -o remount,bind,ro /"]
        return "\n".join([*lines, f'cd /; exec setpriv --reuid {self.user} --regid {self.user} --clear-groups "$@"'])


def skip_without_namespaces() -> None:
    tools = [tool for tool in ("unshare", "setpriv", "mount") if shutil.which(tool) is None]
    if sys.platform != "linux" or tools:
        pytest.skip(f"mount namespaces need Linux, unshare, setpriv and mount; missing: {tools or 'Linux'}")
    tried = subprocess.run(["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(
            f"this user may not create a mount namespace; run the tests as root: {tried.stderr.decode().strip()}"
        )
