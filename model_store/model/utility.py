"""The utility table: for each surface, one expression and one weight per party.

    [surfaces.home]
    weights = { pinner = 1.0, creator = 0.2 }
    [surfaces.home.utilities]
    pinner = "save + 0.5 * like - 2 * hide"
    creator = "(save + like) * sqrt(pin.creator_tail)"

A surface may also state thetas, the least that parties must get: `at_least = { creator = 0.42 }`. Serving does not
enforce them: the weights are tuned to meet them, and metrics and the guard watch them. A party's value of one answer is
sum over positions k of discounts(K)[k] * u[k] (`model_store.model.discount`); a theta bounds its mean over answers.

Expressions may use the model's heads (calibrated probabilities) and `pin.<field>`, the scalar and categorical fields
of its pin groups. Every name and function is checked when the table is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feature_client.features import FetchedFeatures
from feature_client.groups import Embedding, FeatureGroup, Name
from kernels.native.library import library_if_built
from model_store.bundle.manifest import Manifest, Tuning
from model_store.model.expression import Expression, ExpressionError, compile_expression
from model_store.model.logistic import Logistic
from model_store.model.native_utility import NativeUtility, UnknownOperationError, agrees

_log = logging.getLogger(__name__)

#: Limits on a table. An own ranker's has two surfaces of four parties, in 2 kB.
TABLE_BYTES_MAX = 64 << 10
PARTIES_MAX = 16
#: Limit on the processor time of one surface's parties: of a call, and of each candidate. The table of the demo takes a
#: twentieth of that; a request has 10 ms for everything.
_CALL_S_MAX, _CANDIDATE_S_MAX = 1e-3, 1e-6
#: The fastest of so many evaluations counts, because the first ones fill caches, and others disturb some.
_EVALUATIONS = 5


class UtilityError(Exception):
    """A utility table is invalid. The message names the surface, the party and the problem."""


class _SurfaceTable(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weights: dict[Name, Annotated[float, Field(allow_inf_nan=False)]]
    utilities: Annotated[dict[Name, str], Field(min_length=1, max_length=PARTIES_MAX)]
    at_least: dict[Name, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)


class _StatedTuning(Tuning):
    #: `fingerprint` of the surface that the facts are about.
    fingerprint: str


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")
    surfaces: dict[Name, _SurfaceTable]
    tuning: dict[Name, _StatedTuning] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PinAttribute:
    """A scalar or categorical field of a pin group, available to expressions."""

    group: str
    field: str

    @property
    def name(self) -> str:
        return f"pin.{self.field}"


@dataclass(frozen=True, slots=True)
class SurfaceUtility:
    """One surface's compiled table."""

    parties: tuple[str, ...]
    #: float64[P]
    weights: np.ndarray
    expressions: tuple[Expression, ...]
    #: The source text of the expressions.
    sources: tuple[str, ...]
    #: Thetas: by party, the least mean value of an answer.
    at_least: Mapping[str, float]


class UtilityTable:
    """The compiled utilities of all surfaces of a model.

    For one thread only: numexpr programs are not re-entrant.

    Attributes:
        surfaces: the surfaces by name.
        digest: the SHA-256 digest of the table's text.
        heads: the names of the model's heads.
        logistic: the calibration of the heads.
        attributes: the pin attributes that at least one expression reads.
        native: by surface its translation for the native library; a surface without one stays with numexpr.
    """

    def __init__(self, surfaces: Mapping[str, SurfaceUtility], manifest: Manifest, digest: str) -> None:
        self.surfaces = surfaces
        self.digest = digest
        self.heads = tuple(head.name for head in manifest.heads)
        self.logistic = Logistic(*manifest.calibration)
        self.attributes = tuple(
            PinAttribute(group.name, name) for name, group in _pin_attributes(manifest).items()
            if any(f"pin.{name}" in e.names for s in surfaces.values() for e in s.expressions)
        )  # fmt: skip
        self._by_name = {attribute.name: attribute for attribute in self.attributes}
        translated = {name: self._translated(name) for name in surfaces}
        self.native = {name: native for name, native in translated.items() if native is not None}

    def attributes_of(self, surface: str) -> tuple[PinAttribute, ...]:
        """Return the pin attributes that a surface of `native` reads, in order; those of a group are adjacent."""
        return tuple(self._by_name[name] for name in self.native[surface].attributes)

    def party_utilities(self, surface: str, probabilities: np.ndarray, fetched: FetchedFeatures) -> np.ndarray:
        """Evaluate each party's expression.

        Args:
            surface: a surface of the model.
            probabilities: float32[N, H], calibrated.
            fetched: the request's features; missing candidates hold the defaults of their group.

        Returns:
            float64[N, P], parties in the table's order. A non-finite probability gives non-finite utilities.
        """
        columns = {a: fetched.candidate_rows(a.group)[a.field] for a in self.attributes}
        return self.party_utilities_of_rows(surface, probabilities, columns)

    def party_utilities_of_rows(
        self, surface: str, probabilities: np.ndarray, attributes: Mapping[PinAttribute, np.ndarray]
    ) -> np.ndarray:
        """Evaluate each party's expression over rows from any number of requests of one surface.

        Args:
            surface: a surface of the model.
            probabilities: float32[N, H], calibrated.
            attributes: an array of shape [N] for each of `self.attributes`.

        Returns:
            As `party_utilities`.
        """
        if native := self.native.get(surface):
            return native.party_utilities(probabilities, [attributes[a] for a in self.attributes_of(surface)])
        return self.reference_utilities(surface, probabilities, {a.name: v for a, v in attributes.items()})

    def reference_utilities(
        self, surface: str, probabilities: np.ndarray, attributes: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Do the same with numexpr; attributes are named as in expressions."""
        columns = dict(zip(self.heads, probabilities.T.astype(np.float64, "C"), strict=True))
        columns |= {name: values.astype(np.float64) for name, values in attributes.items()}
        table = self.surfaces[surface]
        utilities = np.empty((len(probabilities), len(table.expressions)))
        for i, expression in enumerate(table.expressions):
            utilities[:, i] = expression([columns[name] for name in expression.names])
        return utilities

    def combine(self, surface: str, party_utilities: np.ndarray) -> np.ndarray:
        """Return the weighted sum of party utilities, float64[N, P], as float32[N].

        The sum is taken in float64 in the table's order of parties, because its last bits depend on the order.
        """
        return weighted_sum(party_utilities, self.surfaces[surface].weights)

    def _translated(self, surface: str) -> NativeUtility | None:
        """Translate a surface's expressions for the native library, if the result is numexpr's to the bit."""
        table = self.surfaces[surface]
        if library_if_built() is None:
            return None
        try:
            native = NativeUtility(self.heads, list(self._by_name), table.expressions, table.weights, self.logistic)
        except UnknownOperationError as error:
            _log.debug("surface %s stays with numexpr: the native library lacks %s", surface, error)
            return None

        def reference(probabilities: np.ndarray, attributes: Sequence[np.ndarray]) -> np.ndarray:
            by_name = dict(zip(native.attributes, attributes, strict=True))
            return self.reference_utilities(surface, probabilities, by_name)

        if not agrees(native, len(self.heads), reference):
            _log.debug("surface %s stays with numexpr: the native library computes other numbers here", surface)
            return None
        return native


def weighted_sum(party_utilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weigh the parties, bit for bit as `UtilityTable.combine`.

    Args:
        party_utilities: float64[N, P].
        weights: float64[..., P], any number of weight vectors.

    Returns:
        float32[..., N], for each weight vector.
    """
    with np.errstate(all="ignore"):  # what is not finite sinks to the end of the order
        total = party_utilities[:, 0] * weights[..., 0, None]
        for party in range(1, weights.shape[-1]):
            total += party_utilities[:, party] * weights[..., party, None]
        utilities: np.ndarray = total.astype(np.float32)
    return utilities


def load_utility(content: bytes, manifest: Manifest) -> UtilityTable:
    """Parse and compile a utility table for a model.

    Raises:
        UtilityError: it is not TOML; a surface is missing or unknown; a party lacks a weight or an expression; a theta
            or a statement of tuning is for a party or surface that is not there; an expression uses an unknown name or
            function, or is not a number.
    """
    table = _parsed(content)
    expected, found = {s.name for s in manifest.surfaces}, set(table.surfaces)
    if expected != found:
        raise UtilityError(
            f"the utility table has surfaces {sorted(found)}, model {manifest.ref} ranks {sorted(expected)}"
        )
    names = {head.name for head in manifest.heads} | {f"pin.{name}" for name in _pin_attributes(manifest)}
    surfaces = {name: _compile_surface(name, surface, names) for name, surface in table.surfaces.items()}
    return UtilityTable(surfaces, manifest, hashlib.sha256(content).hexdigest())


def check_time(table: UtilityTable, rows: int) -> None:
    """Evaluate a table for so many candidates, and refuse it if that takes too much of a request's time.

    Processor time is measured, so that other processes do not count.

    Raises:
        UtilityError: names the surface, the time, and the limit.
    """
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(size=(rows, len(table.heads))).astype(np.float32)
    attributes = {attribute: rng.uniform(size=rows) for attribute in table.attributes}
    limit_s = _CALL_S_MAX + _CANDIDATE_S_MAX * rows

    def evaluated_s(surface: str) -> float:
        start_s = time.thread_time()
        table.party_utilities_of_rows(surface, probabilities, attributes)
        return time.thread_time() - start_s

    for surface in table.surfaces:
        fastest_s = min(evaluated_s(surface) for _ in range(_EVALUATIONS))
        if fastest_s > limit_s:
            parties = ", ".join(table.surfaces[surface].parties)
            raise UtilityError(
                f"surface {surface!r}: its utilities take {fastest_s * 1e3:.3g} ms for {rows:,} candidates, the limit "
                f"is {limit_s * 1e3:.3g} ms; shorten the expressions of {parties}"
            )


def fingerprint(surface: SurfaceUtility) -> str:
    """Return 16 hex digits that name a surface's weights, expressions and thetas."""
    parts = [*surface.parties, *map(repr, surface.weights.tolist()), *surface.sources]
    parts += [f"{party}>={theta!r}" for party, theta in sorted(surface.at_least.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def stated_tunings(content: bytes, table: UtilityTable) -> dict[str, Tuning]:
    """Return how the weights of each surface were tuned, as far as the table says so.

    Raises:
        UtilityError: a surface was changed after it was tuned, so what the table says about it is no longer true.
    """
    stated = {}
    for name, told in _parsed(content).tuning.items():
        surface = table.surfaces[name]
        if told.fingerprint != fingerprint(surface):
            raise UtilityError(
                f"surface {name!r} was changed after [tuning.{name}] was written, so its numbers are not those of this "
                f"table; run `pinrank tune` again, or remove [tuning.{name}]"
            )
        stated[name] = Tuning(**{**told.model_dump(exclude={"fingerprint"}), "thetas": dict(surface.at_least)})
    return stated


def load_surface(content: bytes, surface: str, names: set[str]) -> SurfaceUtility:
    """Parse a utility table and compile one surface of it, without a model: for answers that were logged.

    Args:
        content: the table's text.
        surface: the surface to compile; others may be of any model.
        names: what expressions may use: heads, and attributes such as `pin.price`.

    Raises:
        UtilityError: as `load_utility`, or the table lacks the surface.
    """
    table = _parsed(content)
    if surface not in table.surfaces:
        raise UtilityError(f"the utility table has surfaces {sorted(table.surfaces)}, but not {surface!r}")
    return _compile_surface(surface, table.surfaces[surface], names)


def _parsed(content: bytes) -> _Table:
    if len(content) > TABLE_BYTES_MAX:
        raise UtilityError(f"the utility table has {len(content):,} bytes, the limit is {TABLE_BYTES_MAX:,}")
    try:
        table = _Table.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UtilityError(f"the utility table is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UtilityError(f"the utility table is malformed: {problems}") from error
    if strangers := sorted(table.tuning.keys() - table.surfaces.keys()):
        raise UtilityError(f"the utility table states the tuning of {', '.join(strangers)}, but has no such surface")
    return table


def _compile_surface(name: str, table: _SurfaceTable, names: set[str]) -> SurfaceUtility:
    if set(table.weights) != set(table.utilities):
        raise UtilityError(
            f"surface {name!r}: weights are for {sorted(table.weights)}, but utilities for {sorted(table.utilities)}"
        )
    if strangers := sorted(set(table.at_least) - set(table.utilities)):
        raise UtilityError(
            f"surface {name!r}: at_least names {', '.join(strangers)}, but the parties are {', '.join(table.utilities)}"
        )
    parties = tuple(table.utilities)
    expressions = tuple(_compile(f"surfaces.{name}.utilities.{p}", table.utilities[p], names) for p in parties)
    sources = tuple(table.utilities[p] for p in parties)
    weights = np.array([table.weights[p] for p in parties])
    return SurfaceUtility(parties, weights, expressions, sources, dict(table.at_least))


def _compile(where: str, source: str, names: set[str]) -> Expression:
    try:
        return compile_expression(source, names)
    except ExpressionError as error:
        raise UtilityError(f"{where}: {error}") from error


def _pin_attributes(manifest: Manifest) -> dict[str, FeatureGroup]:
    """Return the pin fields that expressions may use, and the group of each."""
    attributes: dict[str, FeatureGroup] = {}
    for group in manifest.needs.pin_groups:
        for field in group.fields:
            if isinstance(field, Embedding):
                continue
            if field.name in attributes:
                raise UtilityError(f"pin.{field.name} is in two groups: {attributes[field.name].ref} and {group.ref}")
            attributes[field.name] = group
    return attributes
