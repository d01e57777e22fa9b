"""What the parties must get: as a value, or relative to what the weights in force give them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ranker.errors import SettingError

_WRITTEN = re.compile(r"(?P<party>[^=\s]+)=(?P<value>[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+)(?P<percent>%?)")


@dataclass(frozen=True, slots=True)
class Theta:
    """The least that a party must get on average, per request.

    Attributes:
        party: its name.
        value: the value itself; or a share of the present value, such as 0.1 for +10%.
        relative: which of the two.
    """

    party: str
    value: float
    relative: bool

    def of(self, present: float) -> float:
        """Return the theta, given what the party gets by the weights in force.

        A relative theta adds its share of the absolute value: +10% of -2 is -1.8, which is more.
        """
        return present + self.value * abs(present) if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.party}={self.written}"

    @property
    def written(self) -> str:
        return f"{100 * self.value:+.6g}%" if self.relative else f"{self.value:.6g}"


def parse_thetas(texts: Sequence[str]) -> tuple[Theta, ...]:
    """Parse `creator=+10%` and `merchant=0.42`. Raises SettingError if one is malformed, or names a party twice."""
    thetas: list[Theta] = []
    for text in texts:
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise SettingError(
                f"--at-least {text}: write PARTY=VALUE or PARTY=+PERCENT%, e.g. merchant=0.42 creator=+10%"
            )
        relative, number = bool(found["percent"]), float(found["value"])
        if relative and found["value"][0] not in "+-":
            raise SettingError(
                f"--at-least {text}: a percentage is relative to what the weights in force give; write the sign, "
                f"e.g. {found['party']}=+{found['value']}%"
            )
        if not math.isfinite(number):
            raise SettingError(f"--at-least {text}: the value must be finite")
        if found["party"] in [theta.party for theta in thetas]:
            raise SettingError(f"--at-least {text}: {found['party']} already has a value")
        thetas.append(Theta(found["party"], number / 100 if relative else number, relative))
    return tuple(thetas)
