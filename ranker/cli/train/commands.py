"""`pinrank train`. It imports PyTorch only when it runs: a serving install has no PyTorch."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ranker.cli.console import ConsoleReporter, explained, fail, note_problems, read_dataset
from ranker.cli.options import grouped
from ranker.cli.train.inputs import DataOptions, NetworkOptions
from ranker.cli.train.options import (
    BundleOptions,
    CheckpointOptions,
    ExecutionOptions,
    ParentOptions,
    TrackingOptions,
    TrainingOptions,
)

if TYPE_CHECKING:
    from model_store.bundle.files import Bundle
    from model_store.registry.store import ModelStore
    from ranker.data.atomic.recbole import AtomicDataset
    from ranker.recipe_settings import Recipe
    from ranker.training.parent import Parent
    from ranker.training.ranks import Ranks


@grouped
def train(
    bundle: BundleOptions,
    parent: ParentOptions,
    data: DataOptions,
    network: NetworkOptions,
    training: TrainingOptions,
    execution: ExecutionOptions,
    checkpoints: CheckpointOptions,
    tracking: TrackingOptions,
) -> None:
    """Train a ranker on interactions and write it as a bundle.

    Example: [bold]pinrank train --data ml-1m --utility utility.toml --store models --version 2 --label canary[/]

    Put the candidate into every token of the sequence (early fusion), and read twice as many actions:
    [bold]pinrank train --utility utility.toml --out bundle --variant early --sequence-length 100[/]

    Weigh saves most, and resume after an interruption with at most ten minutes lost:
    [bold]pinrank train --utility utility.toml --out bundle --head-weight save=4 --resume run[/]

    Continue daily from the serving version on new events; publish only if the new version is no worse:
    [bold]pinrank train --data my-data --name mine --store models --parent stable --publish --label canary[/]

    Learn from the requests that a server answered, and what became of them:
    [bold]pinrank train --data my-data --impressions joined --utility utility.toml --name mine --store models[/]

    Train with two processes:
    [bold]torchrun --standalone --nproc-per-node 2 --no-python pinrank train --utility utility.toml --out bundle[/]
    """
    _refuse_contradictions(bundle, parent, data, training, checkpoints)
    with explained():
        from ranker.export.publishing import published_manifests  # noqa: PLC0415
        from ranker.recipe import assist, make_bundle  # noqa: PLC0415
        from ranker.training.ranks import joined  # noqa: PLC0415
        from ranker.training.settings import Execution  # noqa: PLC0415
        from ranker.training.tracking import tracked  # noqa: PLC0415

        models = bundle.open_store()
        origin = parent.read(models, bundle.name)
        recipe = _recipe(bundle, data, network, training, execution, models, origin)
        gates, plan, impressions = parent.gates(), checkpoints.plan(), data.shown()
        vectors, users = data.vectors(), data.users()
        bundle.check_places(models)
        tracking.check_places()
        with joined(execution.device) as ranks:
            reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True, quiet=not ranks.leads))
            if not ranks.leads:
                work = Execution(ranks, plan, threads=execution.threads)
                assist(_dataset(data, reporter, ranks), recipe, reporter, work, origin, impressions, vectors, users)
                return
            with tracked(tracking.tensorboard, tracking.mlflow, bundle.name, recipe.described(), reporter.note) as told:
                dataset = _dataset(data, reporter, ranks)
                note_problems(dataset, reporter)
                work = Execution(ranks, plan, told, execution.threads)
                with tempfile.TemporaryDirectory() as temporary:
                    folder = bundle.out or Path(temporary) / "bundle"
                    made = make_bundle(
                        *(folder, dataset, recipe, reporter, work, origin, gates, impressions),
                        baseline_requests_max=bundle.baseline_requests_max if models is not None else 0,
                        published=published_manifests(models, bundle.name),
                        vectors=vectors,
                        users=users,
                    )
                    _publish(folder, bundle, models)
    _show(made, models, bundle.label)


def _refuse_contradictions(
    bundle: BundleOptions,
    parent: ParentOptions,
    data: DataOptions,
    training: TrainingOptions,
    checkpoints: CheckpointOptions,
) -> None:
    if bundle.store is None and bundle.out is None:
        fail("the bundle has no destination; add --store DIR, --out DIR or both")
    if (bundle.publish or parent.parent is not None) and bundle.store is None:
        fail("--publish and --parent require --store DIR")
    if bundle.utility is None and parent.parent is None:
        fail("the bundle has no utility table; add --utility FILE, or --parent to use the parent's table")
    if bundle.force and bundle.store is None:
        fail("--force requires --store DIR, which it publishes to")
    if bundle.label is not None and bundle.store is None:
        fail("--label requires --store DIR")
    if parent.gate_ope and (parent.parent is None or data.impressions is None):
        fail("--gate-ope compares with the parent on logged answers; it requires --parent and --impressions DIR")
    if training.off_policy and data.impressions is None:
        fail("--off-policy requires --impressions DIR, whose propensities it weighs by")
    if checkpoints.resume is not None and checkpoints.checkpoints is not None:
        fail("--resume DIR also keeps its checkpoints in DIR; remove --checkpoints")


def _recipe(
    bundle: BundleOptions,
    data: DataOptions,
    network: NetworkOptions,
    training: TrainingOptions,
    execution: ExecutionOptions,
    models: ModelStore | None,
    origin: Parent | None,
) -> Recipe:
    from ranker.export.publishing import free_version  # noqa: PLC0415
    from ranker.recipe_settings import Recipe  # noqa: PLC0415

    table = bundle.utility_table(origin)
    return Recipe(
        name=bundle.name,
        version=free_version(models, bundle.name, bundle.version),
        dataset=bundle.name,
        command=shlex.join(["pinrank", *sys.argv[1:]]),
        utility_toml=table,
        explore_toml=bundle.exploration_table(origin),
        variant=network.variant,
        sequence_length=network.sequence_length,
        interests=network.interests,
        sizes=network.sizes(),
        sampling=data.sampling(),
        training=training.config(execution.precision, from_parent=origin is not None),
    )


def _dataset(data: DataOptions, reporter: ConsoleReporter, ranks: Ranks) -> AtomicDataset:
    with ranks.leader_first():
        return read_dataset(data.data, data.actions, reporter)


def _publish(folder: Path, bundle: BundleOptions, models: ModelStore | None) -> None:
    from ranker.export.publishing import publish_bundle  # noqa: PLC0415

    if models is not None:
        keep_in = Path() if bundle.out is None else None
        publish_bundle(folder, models, bundle.label, keep_in=keep_in, force=bundle.force)


def _show(bundle: Bundle, models: ModelStore | None, label: str | None) -> None:
    from ranker.export.publishing import what_is_left_to_do  # noqa: PLC0415

    size_bytes = sum(len(content) for content in bundle.files.values())
    labelled = "" if label is None else f", label {label}"
    console = Console(markup=False, emoji=False)
    console.print(f"{bundle.manifest.ref}: {size_bytes / 1e6:.2f} MB, digest {bundle.digest[:12]}{labelled}")
    if models is not None:
        for line in what_is_left_to_do(models, bundle, label):
            console.print(line, highlight=False, soft_wrap=True)
