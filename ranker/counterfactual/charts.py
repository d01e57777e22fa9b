"""The chart of an evaluated policy, as SVG."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np

from ranker.counterfactual.evaluate import PolicyEvaluation
from ranker.evaluation.charts import COLOURS, MARKERS, STYLE, panel_grid, svg

#: What the chart leaves out, because its errors are not what its interval says.
_UNDRAWN = ("dm",)


def difference_chart(evaluation: PolicyEvaluation) -> str | None:
    """Draw the difference to the baseline with its interval, one panel per reward; None if everything was refused."""
    units = [unit for unit in evaluation.units if unit.refused is None]
    if not units:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = panel_grid(len(evaluation.rewards), 2.6)
        for panel, reward in zip(panels, evaluation.rewards, strict=True):
            panel.axvline(0, color="#555555", linewidth=1)
            names = [f.estimator for f in units[0].forecasts[reward] if f.estimator not in _UNDRAWN]
            for place, unit in enumerate(units):
                drawn = [f for f in unit.forecasts[reward] if f.estimator in names and f.difference.value is not None]
                values = np.array([f.difference.value for f in drawn], float)
                low = np.array([f.difference.value if f.difference.low is None else f.difference.low for f in drawn])
                high = np.array([f.difference.value if f.difference.high is None else f.difference.high for f in drawn])
                rows = [names.index(f.estimator) + 0.24 * (place - (len(units) - 1) / 2) for f in drawn]
                bars = np.maximum(0, np.abs(np.stack([low, high]).astype(float) - values))
                panel.errorbar(
                    values, rows, xerr=bars, fmt=MARKERS[place], color=COLOURS[place], markersize=4, linewidth=1.3,
                    capsize=2, label=f"whole {unit.unit}" if unit.unit == "orders" else f"single {unit.unit}",
                )  # fmt: skip
            panel.set_yticks(range(len(names)), names)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.set_title(reward)
            panel.grid(visible=False, axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
        return svg(figure)
