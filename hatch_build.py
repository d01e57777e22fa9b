"""Compiles the native library when pinrank is installed or built into a wheel."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile; without a compiler say so and go on: everything works without it, slower."""
        if self.target_name != "wheel":
            return
        native = _load(Path(self.root) / "kernels" / "native" / "build.py")
        try:
            library = native.build()
        except (native.CompilerMissingError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"pinrank's native library is not built, ranking will be slower: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        try:
            build_data["artifacts"].append(str(native.build_http2().relative_to(self.root)))
        except native.Nghttp2MissingError as error:
            self.app.display_warning(f"pinrank's native edge is not built, grpcio will serve instead: {error}")
        build_data["pure_python"] = False
        # The library is loaded by ctypes, so one wheel serves every Python.
        build_data["tag"] = f"py3-none-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("native_build", path)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - a file of ours
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
