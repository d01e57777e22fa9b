"""OpenVINO, imported without its telemetry.

Since 2024, `import openvino` starts a thread that forks the process to send usage data to Google Analytics, unless CI
is set. A ranking server must not send data, and forking a process with threads can hang: we have seen such a child wait
for a lock forever and keep its parent's log open. Without the telemetry package OpenVINO works and sends nothing.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # makes its import fail

import openvino  # noqa: E402

__all__ = ["openvino"]
