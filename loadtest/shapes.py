from __future__ import annotations

#: When a spike begins and ends, as parts of the whole.
_SPIKE = (0.4, 0.6)


def users_at(shape: str, part: float, users_max: int) -> int | None:
    """Return how many users a shape (steps, ramp or spike) has after a part of its time; None when it is over."""
    if part >= 1:
        return None
    spike = 1.0 if _SPIKE[0] <= part < _SPIKE[1] else 0.1
    share = {"steps": (int(part * 4) + 1) / 4, "ramp": part, "spike": spike}[shape]
    return max(1, round(share * users_max))
