"""Reads the policy that a command names: `logged`, a utility table, or a version in a model store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from impressions.slates import Slates
from model_store.bundle.files import NETWORK, UTILITY, Bundle
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
from ranker.errors import PropensityError

LOGGED = "logged"


def read_policy(
    text: str, slates: Slates, store: ModelStore | None, *, baseline: bool = False
) -> tuple[EvaluatedPolicy, SurfaceUtility | None]:
    """Read a policy over logged answers, and its utility table.

    Args:
        text: `logged`, the policy that logged; the path of a utility table (.toml), which orders without exploring; or
            a version with its own exploration: NAME@VERSION, NAME@LABEL, or a label of the model that logged.
        slates: the answers.
        store: the model store; None if the command was given none.
        baseline: whether to compare with it. The version that logged then is the policy that logged: what it earned
            need not be estimated.

    Returns:
        The policy; its utility table, None for `logged`.

    Raises:
        PropensityError: there is no such policy, or the log does not hold what it needs.
        ModelStoreError: the store has no such version.
    """
    if text == LOGGED:
        return logging_policy(slates), None
    if text.endswith(".toml"):
        return _of_file(Path(text), slates)
    if store is None:
        raise PropensityError(
            f"{text!r} names a version, which needs --store; or name a utility table (a .toml file), or {LOGGED}"
        )
    return _of_version(text, slates, store, baseline=baseline)


def _of_file(path: Path, slates: Slates) -> tuple[EvaluatedPolicy, SurfaceUtility]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PropensityError(f"cannot read the utility table {path}: {error.strerror or error}") from error
    table = surface_table(content, slates, str(path))
    return utility_policy(path.name, table, slates), table


def _of_version(
    text: str, slates: Slates, store: ModelStore, *, baseline: bool
) -> tuple[EvaluatedPolicy, SurfaceUtility]:
    logged_name, _, logged_version = slates.model.partition("@")
    name, _, which = text.partition("@") if "@" in text else (logged_name, "@", text)
    version = int(which) if which.isdigit() else store.resolve(name, which)
    bundle = store.read(name, version)
    ref = bundle.manifest.ref
    table = surface_table(bundle.files[UTILITY], slates, f"the utility table of {ref}")
    shown = ref if ref == text else f"{ref} ({text})"
    if ref == slates.model:
        _check_same_table(bundle, slates)
        if baseline:
            return replace(logging_policy(slates), name=shown), table
    else:
        _check_same_network(bundle, store.read(logged_name, int(logged_version)))
    try:
        exploration = read_exploration(bundle, load_utility(bundle.files[UTILITY], bundle.manifest))
    except (ExplorationError, UtilityError) as error:
        raise PropensityError(f"{ref}: {error}") from error
    explorer = None if exploration is None else exploration.surfaces.get(slates.surface)
    if explorer is None:
        return utility_policy(shown, table, slates), table
    return exploring_policy(shown, table, explorer, slates), table


def _check_same_table(bundle: Bundle, slates: Slates) -> None:
    """Refuse a version of another store that only has the name of the one that logged."""
    if bundle.manifest.files[UTILITY].sha256 != slates.utility_digest:
        raise PropensityError(
            f"{bundle.manifest.ref} of this store has another utility table than the {slates.model} that logged; name "
            "the store that served it (--store)"
        )


def _check_same_network(bundle: Bundle, logged: Bundle) -> None:
    """Refuse a version whose probabilities are not those of the log."""
    same = bundle.files[NETWORK] == logged.files[NETWORK] and bundle.manifest.heads == logged.manifest.heads
    if not same:
        raise PropensityError(
            f"{bundle.manifest.ref} has another network or calibration than {logged.manifest.ref}, which logged, so "
            "the logged probabilities are not its own. Evaluate its utility table alone (--policy utility.toml), or "
            "serve it as a canary and evaluate on its own log"
        )
