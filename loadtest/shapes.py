"""Computes how many users a load shape (steps, ramp or spike) has at each point in time. Pure."""

from __future__ import annotations

#: Start and end of the spike, as fractions of the whole duration.
_SPIKE = (0.4, 0.6)


def users_at(shape: str, part: float, users_max: int) -> int | None:
    """Return the number of users after a fraction `part` of the shape's duration; None when the shape is over."""
    if part >= 1:
        return None
    spike = 1.0 if _SPIKE[0] <= part < _SPIKE[1] else 0.1
    share = {"steps": (int(part * 4) + 1) / 4, "ramp": part, "spike": spike}[shape]
    return max(1, round(share * users_max))
