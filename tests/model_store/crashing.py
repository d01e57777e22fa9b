"""Changes a model store in forked child processes, kills each at a chosen step, and reports how it ended.

    python -m tests.model_store.crashing BUNDLES [links|renames|turns]

The second argument selects the volume: with hard links; without them, but with renames that fail if the name is taken;
or with neither.

It reads one JSON list per line, `[store, operation, arguments, step]`, and answers each with a line of JSON. Steps are
counted at every call that changes a file: before it, in the middle of a write, and after it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

from model_store.registry import folder_objects
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import open_model_store

_CHANGING = ("open", "write", "fsync", "link", "unlink", "replace", "rename", "mkdir")


def limit_volume(volume: str) -> None:
    """Remove hard links (`renames`), or also renames that fail if the name is taken (`turns`), as on other volumes."""

    def unknown(number: int):
        def call(*_):
            raise OSError(number, os.strerror(number))

        return call

    if volume in {"renames", "turns"}:
        os.link = unknown(errno.EPERM)  # the error of FAT
    if volume == "turns":
        folder_objects.rename_unless_taken = unknown(errno.EINVAL)


class _Steps:
    def __init__(self, kill_at: int) -> None:
        self.count = 0
        self._kill_at = kill_at

    def arm(self) -> None:
        for name in _CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))
        folder_objects.rename_unless_taken = self._counted("rename", folder_objects.rename_unless_taken)

    def _counted(self, name, real):
        def call(*arguments, **options):
            self._step()
            if name == "write":
                descriptor, content = arguments
                half = real(descriptor, bytes(content)[: len(content) // 2])
                self._step()
                return half + real(descriptor, bytes(content)[half:])
            result = real(*arguments, **options)
            self._step()
            return result

        return call

    def _step(self) -> None:
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def _work(store_url: str, bundles: Path, operation: str, arguments: dict[str, int]) -> str:
    store = open_model_store(store_url)
    match operation:
        case "publish":
            return store.publish(bundles / str(arguments["version"]), by="publisher").digest
        case "label":
            entry = store.set_label("tiny", str(arguments["label"]), arguments["version"], by="mover")
            return str(entry.number if entry else None)
        case "rollback":
            return str(store.rollback("tiny", str(arguments["label"]), by="mover").number)
        case "gc":
            return str(store.gc("tiny", keep=arguments["keep"], by="gc", grace_s=0).versions)
    raise ValueError(operation)


def main() -> None:
    bundles = Path(sys.argv[1])
    limit_volume(sys.argv[2] if len(sys.argv) > 2 else "links")
    for line in sys.stdin:
        store_url, operation, arguments, step = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            steps = _Steps(step)
            real_write = os.write
            steps.arm()
            try:
                done = _work(store_url, bundles, operation, arguments)
            except ModelStoreError as error:
                done = f"refused: {error}"
            real_write(writer, json.dumps({"done": done, "steps": steps.count}).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            content = answer.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, **(json.loads(content) if content else {})}), flush=True)


if __name__ == "__main__":
    main()
