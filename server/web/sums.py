"""Makes one page of the metrics of several processes. Pure.

The rule: counters and histograms are summed over the processes; every gauge gets the label `process`. Processes that
have ended stay in the sums with what they last showed, so that sums never fall.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from prometheus_client.core import Metric

#: The types whose samples are summed.
SUMMED = frozenset({"counter", "histogram", "summary"})
#: A process: its number, and how many processes with this number there were before.
Process = tuple[int, int]
Families = Sequence[Metric]


class Sums:
    """What every process has shown last, and the sums of those that have ended."""

    def __init__(self) -> None:
        self._last: dict[Process, Families] = {}
        self._ended: Families = ()

    def page(self, shown: Mapping[Process, Families], running: Collection[Process]) -> list[Metric]:
        """Return the metrics of all processes together.

        Args:
            shown: what processes show now.
            running: the processes that have not ended. Those of them that show nothing now count with what they showed
                last, without gauges.
        """
        self._last |= shown
        ended = [self._last.pop(one) for one in sorted(self._last.keys() - set(running))]
        self._ended = summed([self._ended, *ended])
        counted = summed([self._ended, *(self._last[one] for one in sorted(self._last))])
        gauges = labelled({number: shown[number, turn] for number, turn in sorted(shown) if (number, turn) in running})
        return [*counted, *gauges]


def summed(pages: Iterable[Families]) -> list[Metric]:
    """Return the sums of the counters and histograms of several pages, by name and labels."""
    found: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for family in (family for page in pages for family in page if family.type in SUMMED):
        _, values = found.setdefault(family.name, (family, {}))
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            values[key] = values.get(key, 0.0) + sample.value
    sums = []
    for family, values in found.values():
        total = Metric(family.name, family.documentation, family.type)
        for (name, labels), value in values.items():
            total.add_sample(name, dict(labels), value)
        sums.append(total)
    return sums


def labelled(pages: Mapping[int, Families]) -> list[Metric]:
    """Return the gauges of several pages, with the number of their process as the label `process`."""
    found: dict[str, Metric] = {}
    for number, page in pages.items():
        for family in (family for family in page if family.type not in SUMMED):
            gauge = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                gauge.add_sample(sample.name, {**sample.labels, "process": str(number)}, sample.value)
    return list(found.values())
