"""Reads the two policies that a command compares: `logged`, a utility table, or a version in a model store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from impressions.slates import Slates
from kernels.engine import EngineFactory
from model_store.bundle.files import NETWORK, UTILITY, Bundle
from model_store.bundle.manifest import Manifest
from model_store.exploration.table import ExplorationError, read_exploration
from model_store.model.utility import SurfaceUtility, UtilityError, load_utility
from model_store.registry.store import ModelStore
from ranker.counterfactual.policies import (
    EvaluatedPolicy,
    exploring_policy,
    logging_policy,
    surface_table,
    utility_policy,
)
from ranker.counterfactual.rescoring import Rescoring, score_again
from ranker.errors import PropensityError

LOGGED = "logged"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two policies over the same answers.

    Attributes:
        slates: the answers, with the heads and attributes that rewards may read.
        policy: the policy to evaluate.
        baseline: the policy to compare it with.
        table: the utility table whose parties are rewards: the policy's, or the baseline's if the policy is `logged`.
        rescoring: which answers they are, if a policy has another network than the one that logged.
    """

    slates: Slates
    policy: EvaluatedPolicy
    baseline: EvaluatedPolicy
    table: SurfaceUtility
    rescoring: Rescoring | None


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """How to score logged answers again.

    Attributes:
        folder: the joined dataset that they were read from.
        factory: opens the engine.
        progress: receives the number of answers done, and of all.
    """

    folder: Path
    factory: EngineFactory
    progress: Callable[[int, int], None] = lambda _done, _total: None


def read_comparison(
    policy: str, against: str, slates: Slates, store: ModelStore | None, stored: StoredAnswers
) -> Comparison:
    """Read two policies over logged answers.

    A version with another network than the one that logged scores the answers again, and both policies are then
    compared on the answers whose log keeps the stored rows. The heads of the network that logged stay the reward model;
    for a head that it lacks, it is the other network's.

    Args:
        policy: `logged`, the policy that logged; the path of a utility table (.toml), which orders without exploring;
            or a version with its own exploration: NAME@VERSION, NAME@LABEL, or a label of the model that logged.
        against: the same.
        slates: the answers.
        store: the model store; None if the command was given none.
        stored: how to score the answers again.

    Raises:
        PropensityError: there is no such policy, or the log does not hold what it needs.
        ModelStoreError: the store has no such version.
        BundleError: a version cannot be loaded.
    """
    named = [_named(text, slates, store) for text in (policy, against)]
    used, own, rescoring = _rescored(named, slates, stored)
    table = next((one.table(used) for one in named if one.content is not None), None)
    if table is None:
        raise PropensityError(
            f"--policy {LOGGED} --against {LOGGED} compares nothing; name a utility table or a version"
        )
    evaluated, baseline = named
    return Comparison(
        used,
        evaluated.over(own.get(evaluated.ref, used)),
        baseline.as_baseline(own.get(baseline.ref, used)),
        table,
        rescoring,
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """A policy by name.

    Attributes:
        shown: the name in reports.
        content: its utility table; None for the policy that logged.
        where: the name of the table in errors.
        bundle: the version, if it is one.
        logged: the manifest of the version that logged, if this one has another network.
    """

    shown: str
    content: bytes | None = None
    where: str = ""
    bundle: Bundle | None = None
    logged: Manifest | None = None

    @property
    def ref(self) -> str:
        return "" if self.bundle is None else self.bundle.manifest.ref

    def table(self, slates: Slates) -> SurfaceUtility:
        if self.content is None:
            raise PropensityError(f"{LOGGED} has no utility table")
        return surface_table(self.content, slates, self.where)

    def as_baseline(self, slates: Slates) -> EvaluatedPolicy:
        """Do the same as `over`. What the version that logged earned need not be estimated: it is what was logged."""
        return replace(logging_policy(slates), name=self.shown) if self.ref == slates.model else self.over(slates)

    def over(self, slates: Slates) -> EvaluatedPolicy:
        """Return the policy over answers that its network has scored."""
        if self.content is None:
            return logging_policy(slates)
        table = self.table(slates)
        if self.bundle is None:
            return utility_policy(self.shown, table, slates)
        try:
            exploration = read_exploration(self.bundle, load_utility(self.content, self.bundle.manifest))
        except (ExplorationError, UtilityError) as error:
            raise PropensityError(f"{self.ref}: {error}") from error
        explorer = None if exploration is None else exploration.surfaces.get(slates.surface)
        if explorer is None:
            return utility_policy(self.shown, table, slates)
        return exploring_policy(self.shown, table, explorer, slates)


def _named(text: str, slates: Slates, store: ModelStore | None) -> _Named:
    if text == LOGGED:
        return _Named(LOGGED)
    if text.endswith(".toml"):
        path = Path(text)
        try:
            return _Named(path.name, path.read_bytes(), str(path))
        except OSError as error:
            raise PropensityError(f"cannot read the utility table {path}: {error.strerror or error}") from error
    if store is None:
        raise PropensityError(
            f"{text!r} names a version, which needs --store; or name a utility table (a .toml file), or {LOGGED}"
        )
    logged_name, _, logged_version = slates.model.partition("@")
    name, _, which = text.partition("@") if "@" in text else (logged_name, "@", text)
    bundle = store.read(name, int(which) if which.isdigit() else store.resolve(name, which))
    ref, logged = bundle.manifest.ref, None
    if ref == slates.model:
        _check_same_table(bundle, slates)
    else:
        found = store.manifest(logged_name, int(logged_version))
        same = bundle.manifest.files[NETWORK] == found.files[NETWORK] and bundle.manifest.heads == found.heads
        logged = None if same else found
    shown = ref if ref == text else f"{ref} ({text})"
    return _Named(shown, bundle.files[UTILITY], f"the utility table of {ref}", bundle, logged)


def _check_same_table(bundle: Bundle, slates: Slates) -> None:
    """Refuse a version of another store that only has the name of the one that logged."""
    if bundle.manifest.files[UTILITY].sha256 != slates.utility_digest:
        raise PropensityError(
            f"{bundle.manifest.ref} of this store has another utility table than the {slates.model} that logged; name "
            "the store that served it (--store)"
        )


def _rescored(
    named: list[_Named], slates: Slates, stored: StoredAnswers
) -> tuple[Slates, dict[str, Slates], Rescoring | None]:
    """Return the answers to compare on, these as other networks score them by "name@version", and which they are."""
    others = {one.ref: one.bundle for one in named if one.bundle is not None and one.logged is not None}
    logged = next((one.logged for one in named if one.logged is not None), None)
    if logged is None:
        return slates, {}, None
    used, scored = score_again(stored.folder, slates, logged, list(others.values()), stored.factory, stored.progress)
    rescoring = Rescoring(
        tuple(others), slates.requests, used.requests / slates.requests, float(np.mean(slates.arms != ""))
    )
    for other in scored:
        used = _with_columns_of(used, other)
    return used, dict(zip(others, scored, strict=True)), rescoring


def _with_columns_of(slates: Slates, other: Slates) -> Slates:
    """Add the heads and attributes that only the other network has; a head whose action was never logged stays out."""
    heads = [n for n, head in enumerate(other.heads) if head not in slates.heads and head in slates.actions]
    attributes = [n for n, name in enumerate(other.attributes) if name not in slates.attributes]
    return replace(
        slates,
        heads=(*slates.heads, *(other.heads[n] for n in heads)),
        probabilities=np.column_stack([slates.probabilities, other.probabilities[:, heads]]),
        attributes=(*slates.attributes, *(other.attributes[n] for n in attributes)),
        attribute_values=np.column_stack([slates.attribute_values, other.attribute_values[:, attributes]]),
    )
