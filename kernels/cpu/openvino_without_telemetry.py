"""OpenVINO, imported without its telemetry.

`import openvino` alone starts a thread that forks the process to tell Google Analytics of it (since 2024, except where
CI is set). A ranking server tells nobody, and a fork of a process with threads may hang: such a child was left behind
waiting for a lock, and held its parent's log open after that had ended. Where the package for telemetry is not there,
OpenVINO does without.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # what an import then finds is no module

import openvino  # noqa: E402

__all__ = ["openvino"]
