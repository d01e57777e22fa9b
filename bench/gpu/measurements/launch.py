"""Launch the Triton kernel once, under a profiler or checker.

`python -m bench.gpu.measurements.launch REQUESTS ROWS [--dry-run]`
"""

from __future__ import annotations

import argparse

import torch

from bench.gpu.measurements.subject import Batch, GpuSubject, device_of, length_of


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=int)
    parser.add_argument("rows", type=int)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device, length = device_of(dry_run=options.dry_run), length_of(dry_run=options.dry_run)
    batch = Batch([options.rows] * options.requests, device, length=length)
    found = GpuSubject(device, length=length).fused(batch)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"launched: {len(found)} rows")


if __name__ == "__main__":
    main()
