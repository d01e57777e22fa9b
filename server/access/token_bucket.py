"""Token buckets: how much of something a caller may use. Pure."""

from __future__ import annotations


class TokenBucket:
    """Fills at a constant rate up to its size. Something larger than the bucket leaves a debt, which is filled first.

    Attributes:
        per_s: tokens that come in a second.
        size: the most that it holds.
    """

    __slots__ = ("_at_s", "_tokens", "per_s", "size")

    def __init__(self, per_s: float, burst_s: float, now_s: float) -> None:
        """Create a full bucket that holds what comes in `burst_s` seconds, and at least one token."""
        self.per_s = per_s
        self.size = max(1.0, per_s * burst_s)
        self._tokens = self.size
        self._at_s = now_s

    def wait_s(self, tokens: float, now_s: float) -> float:
        """Return the seconds until so many tokens may be taken; 0 if they may be taken now."""
        if now_s > self._at_s:
            self._tokens = min(self.size, self._tokens + (now_s - self._at_s) * self.per_s)
            self._at_s = now_s
        return max(0.0, (min(tokens, self.size) - self._tokens) / self.per_s)

    def take(self, tokens: float) -> None:
        """Take tokens, after `wait_s` has said that they are there."""
        self._tokens -= tokens
