"""What a recipe learns from: requests, and the vectors of pins and users that it is given or makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.embeddings import PinEmbeddings, svd_embeddings
from ranker.data.requests import Part, Slice, Split, part_slices, producer_until_ms
from ranker.data.shown import Impressions, Shown, read_shown
from ranker.data.users.rows import UserEncoder
from ranker.embedding.users.carried import encoders_in
from ranker.embedding.vector_file import GivenVectors
from ranker.errors import SettingError
from ranker.progress import Reporter
from ranker.recipe_settings import Recipe, Target, target_of
from ranker.training.parent import Parent, split_after, split_of_new


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from: answered ones, or ones made up of interactions.

    Attributes:
        log: the interactions and, with answered requests, the actions on them.
        shown: the answered requests.
    """

    log: ActionLog
    shown: Shown | None = None

    @staticmethod
    def of(dataset: AtomicDataset, parent: Parent | None, impressions: Impressions | None) -> Source:
        """Read requests; with a parent, of the answered ones those that it has not learned from."""
        log = action_log(dataset)
        if impressions is None:
            return Source(log)
        # Stored rows hold vectors of the space that servers read. A model with embeddings of its own cannot read them.
        since_ms = parent.learned_until_ms if parent else None
        shown = read_shown(impressions, log, since_ms=since_ms, stored_rows=parent is not None)
        return Source(shown.history, shown)

    @property
    def heads(self) -> tuple[str, ...]:
        return self.log.heads if self.shown is None else self.shown.heads

    def notes(self) -> list[str]:
        what = "interaction" if self.shown is None else "shown pin's action"
        missing = [head for head in self.log.schema.heads if head not in self.heads]
        notes = [f"no {what} is a {head}, so the model will have no {head} head" for head in missing]
        return notes if self.shown is None else [*notes, *self.shown.notes]

    def new_to(self, recipe: Recipe, parent: Parent | None) -> Recipe:
        """Return the recipe for the events or requests that the parent has not learned from."""
        if parent is None:
            return recipe
        split = (
            split_after(self.log, parent.learned_until_ms, recipe.split)
            if self.shown is None
            else split_of_new(recipe.split, len(self.shown.requests.time_ms), "answered requests")
        )
        return replace(recipe, parent=parent.bundle.manifest.ref, split=split)

    def learned_until_ms(self, split: Split) -> int:
        return self._slices(split, "validation")[-1].stop_ms

    def _slices(self, split: Split, part: Part) -> list[Slice]:
        if self.shown is None:
            return part_slices(self.log, split, part)
        return self.shown.slices(split, part)


@dataclass(frozen=True, slots=True)
class Given:
    """What there is before the training.

    Attributes:
        parent: the version to continue from.
        pins: vectors of pins; None for the parent's, or an SVD.
        users: makes a vector of each user; None for a ranker that reads none.
    """

    parent: Parent | None
    pins: GivenVectors | None
    users: UserEncoder | None

    @staticmethod
    def of(parent: Parent | None, pins: GivenVectors | None, users: UserEncoder | None) -> Given:
        """Check what is given against the parent, whose own makes the users' vectors.

        Raises:
            SettingError: vectors are of another space than those of the parent, or those of users of another network.
            BundleError: the parent's network of users cannot be read.
        """
        if parent is None:
            return Given(None, pins, users)
        ref = parent.bundle.manifest.ref
        if pins is not None and pins.space != parent.embeddings.space:
            raise SettingError(
                f"{ref} reads vectors of {parent.embeddings.space.ref}, and the file has vectors of {pins.space.ref}; "
                "rotate them with `pinrank embed align`, or train without --parent"
            )
        own = next(iter(encoders_in([parent.bundle])), None)
        if users is not None and (own is None or users.content != own.content):
            reads = "no vectors of users" if own is None else f"vectors of users by its own network, {own.space.ref}"
            raise SettingError(
                f"{ref} reads {reads}, and its successor reads the same; leave out --user-vectors, or train a first "
                "version without --parent"
            )
        return Given(parent, pins, own)

    @property
    def encoders(self) -> list[UserEncoder]:
        return [self.users] if self.users else []

    def target(self, recipe: Recipe, source: Source) -> Target:
        """Do what `target_of` does."""
        spaces = [None if one is None else one.space for one in (self.pins, self.users)]
        return target_of(recipe, source.log, self.parent, source.heads, *spaces)

    def embeddings(self, source: Source, recipe: Recipe, reporter: Reporter) -> PinEmbeddings:
        """Return the vectors of pins that the bundle will carry: given ones, the parent's, or those of an SVD.

        Raises:
            DatasetError: what is given knows events of the training, or the users' network reads other vectors of pins.
        """
        if source.shown is None:
            log, until_ms = source.log, producer_until_ms(source.log, recipe.split)
        else:
            log, until_ms = source.shown.dataset, int(source.shown.requests.time_ms[0])
        if self.pins is not None:
            self.pins.refuse_after(until_ms)
            found = self.pins.saved(log, until_ms)
        elif self.parent is not None:
            found = self.parent.embeddings
        else:
            with reporter.step("embeddings"):
                found = svd_embeddings(log, until_ms, recipe.training.seed, recipe.dataset)
        if self.users is not None and self.parent is None:
            self.users.check(found.space, until_ms)
        return found
