"""Searches constants inside the expressions of a surface, such as the factor of `hide` in the pinner's.

The yardstick is what happened: the table in force, evaluated over the labels instead of the probabilities, summed with
the positions' discounts over each order. Predictions cannot be the yardstick, because by them no constant beats the
one in force: the weights already give its best orders. A constant wins if orders by it collect more of what users did,
which it can where a head is miscalibrated among the candidates that compete.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model_store.bundle.files import UTILITY, Bundle
from model_store.model.utility import SurfaceUtility
from ranker.errors import SettingError
from ranker.evaluation.bootstrap import RESAMPLES, Estimate, resample
from ranker.tuning.inputs import TuningData, utility_of
from ranker.tuning.results import Infeasible
from ranker.tuning.tune import Goal, split_users, tune
from ranker.tuning.utility_file import with_expressions

#: Larger constants only overflow what they multiply.
_BOUND_MAX = 1e9
_WRITTEN = re.compile(r"(?:(?P<party>[\w-]+)\s*:)?\s*(?P<what>[\w.]+)\s+in\s+\[(?P<low>[^,\]]+),(?P<high>[^,\]]+)\]")


@dataclass(frozen=True, slots=True)
class FreeConstant:
    """A constant of an expression, and where it may lie.

    Attributes:
        party: whose expression.
        name: how it was asked for: the name that it multiplies, or its digits.
        start, stop: its place in the expression's text.
        value: its present value.
        low, high: the bounds of the search.
    """

    party: str
    name: str
    start: int
    stop: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.party}: {self.name}"


@dataclass(frozen=True, slots=True)
class ConstantSearch:
    """What the search found.

    Attributes:
        content: the utility table with the best constants.
        values: by constant, its value in force and the best one.
        trials: how many values were tried.
        held_out: what the orders collect per request of users that the search did not see, by the constants in force
            and by the best ones, both with tuned weights; and the difference.
    """

    content: bytes
    values: dict[str, tuple[float, float]]
    trials: int
    held_out: tuple[Estimate, Estimate, Estimate] | None


def find_constants(texts: Sequence[str], surface: SurfaceUtility, goal: Goal) -> tuple[FreeConstant, ...]:
    """Find the constants that `--free` names. Raises SettingError if one is malformed, missing or ambiguous."""
    found: list[FreeConstant] = []
    for text in texts:
        one = _found(text, surface, goal)
        if any((one.party, one.start) == (other.party, other.start) for other in found):
            raise SettingError(f"--free {text!r}: this constant is searched already")
        found.append(one)
    return tuple(found)


def _found(text: str, surface: SurfaceUtility, goal: Goal) -> FreeConstant:
    where = f"--free {text!r}"
    written = _WRITTEN.fullmatch(text.strip())
    if written is None:
        raise SettingError(f'{where}: write "NAME in [LOW, HIGH]" or "PARTY: NUMBER in [LOW, HIGH]"')
    party, what = written["party"] or goal.maximised, written["what"]
    if party not in surface.parties:
        raise SettingError(f"{where}: there is no party {party!r}; the parties are {', '.join(surface.parties)}")
    if party in [theta.party for theta in goal.thetas]:
        raise SettingError(f"{where}: {party} has a theta, which would mean something else for each constant")
    try:
        low, high = float(written["low"]), float(written["high"])
    except ValueError as error:
        raise SettingError(f"{where}: the bounds must be numbers") from error
    if not -_BOUND_MAX <= low < high <= _BOUND_MAX:
        raise SettingError(
            f"{where}: the bounds must be finite, within {_BOUND_MAX:g} of 0, and the first below the second"
        )
    source = _source(surface, party)
    tree = ast.parse(source, mode="eval")
    by_digits = what[0].isdigit() or what[0] == "."
    places = [
        (
            _place(source, node.lineno, node.col_offset),
            _place(source, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset),
        )
        for node in (_written_as(tree, source, what) if by_digits else _factors_of(tree, what))
    ]
    if len(places) != 1:
        kind = f"the number {what} is written" if by_digits else f"a constant multiplies {what}"
        raise SettingError(
            f"{where}: in {party}'s expression {source!r}, {kind} {len(places)} times, not once; "
            "name the constant by its digits, and write it differently from others, e.g. 2.0 beside 2"
        )
    start, stop = places[0]
    return FreeConstant(party, what, start, stop, float(source[start:stop]), low, high)


def _written_as(tree: ast.AST, source: str, digits: str) -> list[ast.Constant]:
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [node for node in constants if ast.get_source_segment(source, node) == digits]


def _factors_of(tree: ast.AST, name: str) -> list[ast.Constant]:
    """Return the constants that multiply a name directly, on either side, with or without a sign."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for factor, other in ((node.left, node.right), (node.right, node.left)):
                bare = factor.operand if isinstance(factor, ast.UnaryOp) else factor
                if isinstance(bare, ast.Constant) and ast.unparse(other) == name:
                    found.append(bare)
    return found


def with_constants(surface: SurfaceUtility, values: Mapping[FreeConstant, float]) -> dict[str, str]:
    """Return the expressions of the parties whose constants change."""
    changed: dict[str, str] = {}
    for constant in sorted(values, key=lambda constant: -constant.start):  # from the back, so that places stay right
        source = changed.get(constant.party, _source(surface, constant.party))
        # A sign binds less tightly than a power: -3 ** save is not (-3) ** save.
        written = f"{values[constant]:.4g}" if values[constant] >= 0 else f"({values[constant]:.4g})"
        changed[constant.party] = source[: constant.start] + written + source[constant.stop :]
    return changed


def _source(surface: SurfaceUtility, party: str) -> str:
    return surface.sources[surface.parties.index(party)].strip()


def _place(source: str, line: int, column: int) -> int:
    """Return where in a text a node of its tree starts or stops; `ast` counts lines from 1, and bytes from 0."""
    lines = source.split("\n")
    return sum(len(before) + 1 for before in lines[: line - 1]) + len(lines[line - 1].encode()[:column].decode())


def search_constants(
    data: TuningData,
    bundle: Bundle,
    goal: Goal,
    constants: Sequence[FreeConstant],
    seed: int,
    trials: int,
    held_out_share: float,
    top_k: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ConstantSearch | Infeasible:
    """Try constants by a tree-structured Parzen estimator, each with the weights that meet the thetas.

    J. Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011; the implementation is Optuna's. The
    constants in force stay if no trial is better on the users that the search sees.

    Args:
        data: the requests; their labels are the yardstick.
        bundle: the bundle with the table in force.
        goal: as for `tune`.
        constants: the constants to search.
        seed: draws the users that are held out, as for `tune`, and the trials.
        trials: how many values to try.
        held_out_share: share of users that the search does not see.
        top_k: how many positions of an answer count; 0 means all.
        progress: receives the finished and all trials.
    """
    import optuna  # noqa: PLC0415 - it comes with the tune extra, and only this needs it

    table = utility_of(bundle, data.surface)
    surface, in_force = table.surfaces[data.surface], data.scored(table, top_k)
    rewards = in_force.replaced(data.rewards(table))
    constrained = [theta.party for theta in goal.thetas]
    kept = np.array([w * (p not in constrained) for p, w in zip(surface.parties, goal.weights, strict=True)])
    inside, outside = split_users(data.users, held_out_share, seed)

    def content_with(values: Mapping[FreeConstant, float]) -> bytes:
        return with_expressions(bundle.files[UTILITY], data.surface, with_constants(surface, values))

    def collected(values: Mapping[FreeConstant, float]) -> np.ndarray | Infeasible:
        """Return float64[R], the yardstick of each order by these constants and the weights tuned with them."""
        ordering = data.scored(utility_of(bundle, data.surface, content_with(values)), top_k)
        found = tune(in_force, goal, seed, held_out_share, 0, fronts=False, ordering=ordering)
        return found if isinstance(found, Infeasible) else ordering.served(found.weights, rewards) @ kept

    present = collected({constant: constant.value for constant in constants})
    if isinstance(present, Infeasible):  # no constant changes that, as constrained parties have none that are free
        return present

    def objective(trial: optuna.Trial) -> float:
        values = {
            constant: _rounded(trial.suggest_float(str(constant), constant.low, constant.high))
            for constant in constants
        }
        reached = collected(values)
        progress(trial.number + 1, trials)
        return -np.inf if isinstance(reached, Infeasible) else float(reached[inside].mean())

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    best = {constant: constant.value for constant in constants}
    if study.best_value > float(present[inside].mean()):
        best = {constant: _rounded(study.best_params[str(constant)]) for constant in constants}
    return ConstantSearch(
        content_with(best),
        {str(constant): (constant.value, value) for constant, value in best.items()},
        trials,
        _compared(data.users[outside], present[outside], collected(best), outside, seed),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _compared(
    users: np.ndarray, before: np.ndarray, reached: np.ndarray | Infeasible, outside: np.ndarray, seed: int
) -> tuple[Estimate, Estimate, Estimate] | None:
    if isinstance(reached, Infeasible) or not len(outside):
        return None
    sums = resample(users, np.column_stack([before, reached[outside], np.ones(len(before))]), RESAMPLES, seed)
    old, new = sums[0] / sums[2], sums[1] / sums[2]
    return old.estimate(), new.estimate(), (new - old).estimate()
