"""Writes a small dataset with a pattern to learn: each user likes pins of one kind, which the newest actions show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

USERS = 60
PINS = 90
KINDS = 3


def write_atomic(folder: Path, seed: int = 3, per_user: int = 40, name: str = "tiny-taste", start_s: int = 0) -> Path:
    """Write NAME.inter and NAME.item; users arrive one after another, in overlapping bursts."""
    rng = np.random.default_rng(seed)
    lines = []
    for user in range(USERS):
        kind = user % KINDS
        for step, pin in enumerate(rng.choice(PINS, per_user, replace=False)):
            rating = int(rng.integers(4, 6)) if pin % KINDS == kind else int(rng.integers(1, 4))
            time_s = start_s + 1_000 * user + 97 * step
            lines.append((time_s, f"u{user}\tp{pin}\t{rating}\t{time_s}"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line for _, line in sorted(lines)]
    (folder / f"{name}.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows]) + "\n"
    )
    items = [f"p{pin}\tPin number {pin}" for pin in range(PINS)]
    (folder / f"{name}.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq", *items]) + "\n")
    return folder
