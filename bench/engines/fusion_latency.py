"""Measure what each way to fuse a user's actions with a candidate costs to serve, without training.

Latency does not depend on the weights, so every variant of the recipe is exported with random ones, into the manifest
and embeddings of the demo's models. One server serves them all, to one client that asks for one after the other. Where
the processor has products of bf16, a second server serves the published size with `engine_products = "bf16"`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import torch

from bench.awake import kept_awake
from bench.features.synthetic import fill
from bench.harness import BenchmarkError, Claim, Conclusion, Raw, markdown_table
from bench.processes import server_process
from bench.test_bed import CONFIG, SEED
from feature_client.stores.open_store import open_store
from kernels.encoder import has_instruction
from kernels.engine import FeatureBatch
from loadtest.workload import Workload
from model_store.bundle.files import GOLDEN, NETWORK, PARAMETERS, Bundle, write_bundle
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from model_store.registry.store import open_model_store
from pinrank.channels import open_channel
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from ranker.data.embeddings import embeddings_of
from ranker.data.inputs import RECENCY, SIMILARITIES
from ranker.export.bundle import check_parity, export_onnx
from ranker.export.golden import golden_inputs
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.network.variants import network_overrides, sequence_length
from ranker.training.parent import encode_parameters
from server.config_sources import load_config

#: The variant of a training that names none.
DEFAULT = "late"
BASE, SUBJECT, PUBLISHED = "base", "early", "published"
#: The published size with products of bf16.
LOWER = f"{PUBLISHED}, bf16"
VARIANTS = (BASE, DEFAULT, "cross", SUBJECT, PUBLISHED)
CANDIDATES = 128
#: What early fusion of the actions may add to the latency, required and aimed at; the latter is what the default may.
REQUIRED_PERCENT, AIMED_PERCENT = 60.0, 20.0


@dataclass(frozen=True, slots=True)
class FusionPlan:
    variants: tuple[str, ...] = VARIANTS
    rounds: int = 20
    #: Requests of a variant in one round, each of another user.
    requests: int = 40
    users: int = 500


QUICK = FusionPlan(variants=(BASE, DEFAULT, SUBJECT), rounds=1, requests=3, users=5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Export and serve every variant. One label of the configuration must be of a model without actions.

    Raises:
        BenchmarkError: the server did not start, or an answer was not complete.
    """
    plan = QUICK if quick else FusionPlan()
    settings = load_config(config)
    models = open_model_store(settings.model_store)
    bundles = [models.read(settings.model, models.resolve(settings.model, label)) for label in settings.labels]
    widest = max(bundles, key=lambda bundle: bundle.manifest.sequence_length)
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary, kept_awake() as awake:
        folder = Path(temporary)
        folders = {}
        for version, variant in enumerate(plan.variants, start=1):
            folders[variant] = folder / variant
            _export_untrained(folders[variant], variant, version, bundles)
        store = f"lmdb://{folder / 'features'}"
        users, pins = asyncio.run(_fill(store, widest, plan.users))
        workload = Workload(users, pins, ((min(CANDIDATES, len(pins)), 1.0),), seed=SEED)
        asked = [ranking_pb2.RankRequest.FromString(content) for content in workload.requests(plan.requests)]
        requests = {variant: [labelled(request, variant) for request in asked] for variant in plan.variants}
        raw: Raw = {
            "candidates": CANDIDATES, "sequence_length": widest.manifest.sequence_length, "cores_kept_awake": awake,
            "latency_ms": {variant: [] for variant in plan.variants},
        }  # fmt: skip
        versions: dict[str, int] = {}
        versions_lower: dict[str, int] = {}
        with ExitStack() as opened:
            channel = opened.enter_context(open_channel(opened.enter_context(served(folders, store, folder))))
            if has_instruction("bf16") and PUBLISHED in plan.variants:
                only = {PUBLISHED: folders[PUBLISHED]}
                (folder / "bf16").mkdir()
                second = opened.enter_context(served(only, store, folder / "bf16", products="bf16"))
                channel_lower = opened.enter_context(open_channel(second))
                raw["latency_ms"][LOWER] = []
            for round_number in range(plan.rounds + 1):
                round_ms = in_turn_ms(channel, requests, versions)
                if LOWER in raw["latency_ms"]:
                    asked_lower = {PUBLISHED: requests[PUBLISHED]}
                    found = in_turn_ms(channel_lower, asked_lower, versions_lower, products="bf16")
                    round_ms[LOWER] = found[PUBLISHED]
                if round_number:  # the first round is a warm-up
                    for variant, milliseconds in round_ms.items():
                        raw["latency_ms"][variant].append(milliseconds)
                    yield raw


def _export_untrained(folder: Path, variant: str, version: int, bundles: Sequence[Bundle]) -> None:
    """Write a bundle with random weights, like the one among `bundles` that reads actions just if the variant does."""
    overrides = network_overrides(variant)
    reads = overrides["fusion"] != "none"
    like = next((one for one in bundles if bool(one.manifest.sequence_length) == reads), None)
    widest = max(bundles, key=lambda bundle: bundle.manifest.sequence_length).manifest
    if like is None or widest.sequence is None:
        raise BenchmarkError(f"no configured label has a model that {'reads' if reads else 'does not read'} actions")
    own = (RECENCY, SIMILARITIES)  # of every network that is trained today and reads actions
    inputs = tuple(tensor for tensor in like.manifest.inputs if tensor not in own)
    inputs = (*inputs, *own) if reads else inputs
    length = sequence_length(variant)
    manifest = like.manifest.model_copy(update={"version": version, "inputs": inputs, "sequence_length": length})
    golden = golden_inputs(manifest, embeddings_of(like), SEED)
    assembler = Assembler(manifest)
    batch = FeatureBatch.concat([assembler.assemble(*one) for one in golden])
    torch.manual_seed(SEED)
    network = RankerNetwork(
        NetworkConfig(
            heads=len(manifest.heads),
            actions=len(widest.sequence.actions),
            surfaces=len(widest.sequence.surfaces),
            scalars=batch.request["user_scalars"].shape[1],
            recency=batch.request[RECENCY.name].shape[1] if reads else 0,
            similarities=batch.candidate[SIMILARITIES.name].shape[1] if reads else 0,
            **overrides,
        )
    )
    content = export_onnx(network, batch)
    probabilities = np.split(
        calibrate(manifest, check_parity(network, content, manifest, batch)), batch.row_splits[1:-1]
    )
    files = {
        **like.files,
        NETWORK: content,
        GOLDEN: encode_golden([GoldenRequest(*one, p) for one, p in zip(golden, probabilities, strict=True)]),
        PARAMETERS: encode_parameters(network),
    }
    fields = {name: getattr(manifest, name) for name in type(manifest).model_fields if name != "files"}
    write_bundle(folder, fields, files)


async def _fill(address: str, bundle: Bundle, users: int) -> tuple[np.ndarray, np.ndarray]:
    store = open_store(address)
    await store.start()
    found = await fill(store, bundle, users, SEED)
    await store.close()
    return found


def labelled(request: ranking_pb2.RankRequest, label: str) -> ranking_pb2.RankRequest:
    """Return the request for the model under a label."""
    asked = ranking_pb2.RankRequest()
    asked.CopyFrom(request)
    asked.label = label
    return asked


@contextmanager
def served(folders: Mapping[str, Path], feature_store: str, folder: Path, products: str = "float32") -> Iterator[str]:
    """Serve every bundle under a label with its name. Yields the address."""
    models = open_model_store(folder / "models")
    for label, source in folders.items():
        manifest = models.publish(source).manifest
        models.set_label(manifest.name, label, manifest.version)
    config = folder / "pinrank.toml"
    labels = ", ".join(f'"{label}"' for label in folders)
    config.write_text(
        f'model_store = "{folder / "models"}"\nmodel = "{manifest.name}"\nlabels = [{labels}]\n'
        f'feature_store = "memory://"\nengine_products = "{products}"\n[surfaces.home]\ndeadline_ms = 1000\n'
        # It would move the label of a slower variant to the version of the fastest.
        "[guard]\nenabled = false\n"
    )
    with server_process(config, feature_store, folder / "server.log") as (address, _, _):
        yield address


def in_turn_ms(
    channel: grpc.Channel,
    requests: Mapping[str, Sequence[ranking_pb2.RankRequest]],
    versions: dict[str, int],
    products: str = "float32",
) -> dict[str, list[float]]:
    """Send the requests of every variant, one at a time. Return the latencies by variant, in milliseconds.

    Args:
        channel: to the server.
        requests: by variant, each with the variant's label.
        versions: the version that answers each variant; the first round fills it, and later ones are checked.
        products: what the encoder must have multiplied.

    Raises:
        BenchmarkError: an answer was not complete, or came from another version or other products.
    """
    rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
    milliseconds: dict[str, list[float]] = {variant: [] for variant in requests}
    for variant, asked in requests.items():
        for request in asked:
            started_s = time.perf_counter()
            answer = rank(request, timeout=5.0)
            milliseconds[variant].append((time.perf_counter() - started_s) * 1e3)
            lost = answer.degradation
            if len(answer.pin_ids) != len(request.pin_ids) or lost.sequence_missing or lost.user_missing:
                raise BenchmarkError(f"{variant} answered {len(answer.pin_ids)} pins, degraded: {lost}")
            if answer.versions.products != products:
                raise BenchmarkError(f"{variant} was computed with products of {answer.versions.products}")
            version = answer.versions.model_version
            if versions.setdefault(variant, version) != version or len({*versions.values()}) < len(versions):
                raise BenchmarkError(f"version {version} answered for {variant}; the versions were {versions}")
    return milliseconds


def conclude(raw: Raw) -> Conclusion:
    p50_ms = {variant: [float(np.median(one)) for one in rounds] for variant, rounds in raw["latency_ms"].items()}
    over = {
        variant: 100 * (float(np.median(np.array(rounds) / np.array(p50_ms[BASE]))) - 1)
        for variant, rounds in p50_ms.items()
    }
    name = f"P50 of {raw['candidates']} candidates, {SUBJECT} over {BASE}"
    claims: tuple[Claim, ...] = (
        Claim(
            f"P50 of {raw['candidates']} candidates, {DEFAULT} over {BASE}",
            over.get(DEFAULT), AIMED_PERCENT, "%", "at_most",
        ),
        Claim(f"{name}, required", over[SUBJECT], REQUIRED_PERCENT, "%", "at_most"),
        Claim(f"{name}, aimed at", over[SUBJECT], AIMED_PERCENT, "%", "at_most"),
    )  # fmt: skip
    summary = {f"{variant}, P50 ms": float(np.median(rounds)) for variant, rounds in p50_ms.items()}
    summary |= {f"{variant}, P50 over {BASE} %": percent for variant, percent in over.items() if variant != BASE}
    rows = [(f"`{variant}`", f"{np.median(p50_ms[variant]):.2f}", f"{over[variant]:+.0f}%") for variant in p50_ms]
    return Conclusion(summary, claims, markdown_table("Latency by variant", ("variant", "P50 ms", "over base"), rows))
