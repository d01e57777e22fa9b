"""An evaluation as tables: plain text for any medium, and Rich tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ranker.evaluation.bootstrap import Estimate
from ranker.evaluation.gates import shortfalls
from ranker.evaluation.metrics import TOP
from ranker.evaluation.results import Evaluation, HeadFacts, HeadScore, Hit, Paired, SliceScore

NONE = "-"

_BASELINES_NOTE = (
    "All HIT@3 come from the same requests and candidates, and lifts from the same resamples of users. The dot product "
    "multiplies the vectors of user and pin. Item kNN counts the users who acted on the same pins. LightGBM learns "
    "from the network's inputs and their similarities, with one model per head: of probabilities, or of the order "
    "within a request."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A text; `strong` marks the best scorer of a head, or a lift whose interval excludes 0."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class TextTable:
    """Columns with headings, of which the first `left` contain words, and lines in one block per head."""

    headings: tuple[str, ...]
    left: int
    blocks: tuple[tuple[tuple[Cell, ...], ...], ...]


def baseline_table(evaluation: Evaluation) -> TextTable:
    """Return a block per head and bundle: the bundle's HIT@3, then each baseline's with the bundle's lift over it."""
    lift = "bundle's lift [95%]"
    blocks = []
    for head in evaluation.heads:
        for scorer in evaluation.scorers:
            found = [c for c in evaluation.comparisons if (c.head, c.scorer) == (head.head, scorer.name)]
            own = next(score for score in evaluation.scores if (score.head, score.scorer) == (head.head, scorer.name))
            means = [None if hit is None else hit.mean.value for hit in (own.hit_at_3_by_head, own.hit_at_3_by_utility)]
            measured = (cell for mean in means for cell in (Cell(number(mean)), Cell("")))
            lines = [(Cell(_head_name(head)), Cell(scorer.name), *measured)]
            lines += [
                (Cell(""), Cell(c.baseline), *_paired_cells(c.by_head), *_paired_cells(c.by_utility)) for c in found
            ]
            blocks.append(tuple(lines))
    headings = ("head", "scorer", f"HIT@{TOP} by head", lift, f"HIT@{TOP} by utility", lift)
    return TextTable(headings, 2, tuple(blocks))


def baseline_note(evaluation: Evaluation) -> str:
    """Explain the table of baselines, and how much LightGBM learned from."""
    return " ".join([_BASELINES_NOTE, *([] if evaluation.trees is None else [str(evaluation.trees)])])


def baseline_lines(evaluation: Evaluation) -> list[str]:
    """Return a sentence for each baseline that could not be compared with, and each that a bundle falls behind."""
    lines = [f"{name} is not compared: {reason}" for name, reason in evaluation.baselines_missing.items()]
    for scorer in evaluation.scorers if evaluation.comparisons else ():
        behind = shortfalls(evaluation, scorer.name)
        lines += [f"{scorer.name} is behind a baseline: {sentence}" for sentence in behind]
    return lines


def head_table(evaluation: Evaluation) -> TextTable:
    """Return one line per head and scorer."""
    lift = f"lift vs {evaluation.baseline} [95%]"
    headings = (
        "head", "scorer", f"HIT@{TOP} by utility", lift, f"HIT@{TOP} by head", lift, "AUC", "ECE", "worst decile",
    )  # fmt: skip
    blocks = []
    for head in evaluation.heads:
        scores = [score for score in evaluation.scores if score.head == head.head]
        blocks.append(
            tuple(
                (
                    Cell(_head_name(head) if place == 0 else ""),
                    Cell(score.scorer),
                    *_hit_cells(score, scores, evaluation.baseline, lower_is_better=head.lower_is_better),
                    Cell(number(score.auc)),
                    Cell(number(score.ece)),
                    Cell(_decile(score)),
                )
                for place, score in enumerate(scores)
            )
        )
    return TextTable(headings, 2, tuple(blocks))


def slice_table(evaluation: Evaluation) -> TextTable:
    """Return one line per head, slice of users and scorer; a slice without counted requests has a single line."""
    lift = f"lift vs {evaluation.baseline} [95%]"
    headings = (
        "head", "users", "requests", "scorer", f"HIT@{TOP} by utility", lift, f"HIT@{TOP} by head", lift,
    )  # fmt: skip
    blocks = []
    for head in evaluation.heads:
        lines: list[tuple[Cell, ...]] = []
        for span in evaluation.slices:
            scores = [s for s in evaluation.slice_scores if (s.head, s.slice) == (head.head, span.name)]
            if not scores[0].requests:
                scores = scores[:0]
                lines.append((Cell(head.head), Cell(span.name), Cell("0"), *[Cell(NONE)] * 5))
            lines += [
                (
                    Cell(head.head if place == 0 else ""),
                    Cell(span.name if place == 0 else ""),
                    Cell(f"{score.requests:,}" if place == 0 else ""),
                    Cell(score.scorer),
                    *_hit_cells(score, scores, evaluation.baseline, lower_is_better=head.lower_is_better),
                )
                for place, score in enumerate(scores)
            ]
        blocks.append(tuple(lines))
    return TextTable(headings, 2, tuple(blocks))


def slice_line(evaluation: Evaluation) -> str:
    """Describe the slices and their numbers of requests in one line."""
    parts = []
    for span in evaluation.slices:
        upper = "or more" if span.actions_below is None else f"to {span.actions_below - 1}"
        parts.append(f"{span.name}: {span.actions_min} {upper}, {span.requests:,} requests of {span.users:,} users")
    return "Slices of users by their number of earlier actions. " + "; ".join(parts) + "."


def terminal_tables(evaluation: Evaluation) -> list[Table]:
    """Return the tables of baselines, if any, of heads and of slices."""
    against = (
        [rich_table(baseline_table(evaluation), "Against baselines", baseline_note(evaluation))]
        if evaluation.comparisons
        else []
    )
    heads = rich_table(
        head_table(evaluation),
        f"{evaluation.requests:,} test requests of {evaluation.users:,} users, {evaluation.rows:,} rows",
        "Candidates are the logged pins and uniform samples of other pins; probabilities are relative to them. "
        "A request counts for a head if some candidate received the action.",
    )
    return [*against, heads, rich_table(slice_table(evaluation), "By user activity", slice_line(evaluation))]


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _decile(score: HeadScore) -> str:
    worst = score.worst_decile
    return NONE if worst is None or worst.off is None else f"{worst.off:+.0%}"


def percent(estimate: Estimate | None) -> str:
    """Return a lift with its interval."""
    if estimate is None or estimate.value is None:
        return NONE
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.1f}%"
    return f"{estimate.value:+.1f}% [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _paired_cells(paired: Paired | None) -> tuple[Cell, Cell]:
    if paired is None:
        return Cell(NONE), Cell(NONE)
    lift = paired.lift_percent
    return Cell(number(paired.baseline.value)), Cell(percent(lift), _leaves_out_zero(lift))


def _head_name(head: HeadFacts) -> str:
    return f"{head.head} (by utility: lower is better)" if head.lower_is_better else head.head


def _hit_cells(
    score: HeadScore | SliceScore, rivals: Sequence[HeadScore | SliceScore], baseline: str, *, lower_is_better: bool
) -> list[Cell]:
    cells = []
    for order in ("utility", "head"):
        hit: Hit | None = getattr(score, f"hit_at_{TOP}_by_{order}")
        others = [h.mean.value for r in rivals if (h := getattr(r, f"hit_at_{TOP}_by_{order}")) is not None]
        known = [value for value in others if value is not None]
        best = min if lower_is_better and order == "utility" else max
        value = None if hit is None else hit.mean.value
        cells.append(Cell(number(value), strong=len(known) > 1 and value == best(known)))
        if score.scorer == baseline and hit is not None:
            cells.append(Cell("baseline"))
        else:
            lift = None if hit is None else hit.lift_percent
            cells.append(Cell(percent(lift), strong=_leaves_out_zero(lift)))
    return cells


def _leaves_out_zero(estimate: Estimate | None) -> bool:
    if estimate is None or estimate.low is None or estimate.high is None:
        return False
    return estimate.low > 0 or estimate.high < 0


def rich_table(content: TextTable, title: str, caption: str) -> Table:
    """Return a table for a terminal."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for place, heading in enumerate(content.headings):
        words = place < content.left or heading == "scorer"
        table.add_column(heading, justify="left" if words else "right")
    for block in content.blocks:
        for line in block:
            table.add_row(*(Text(c.text, "bold" if c.strong else "") for c in line))
        table.add_section()
    return table
