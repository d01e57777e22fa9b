"""A model that can answer: a verified bundle, compiled, proven on its golden requests and warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feature_client.features import FeatureNeeds
from kernels.engine import Engine, EngineError, EngineFactory, FeatureBatch, Progress, UnavailableError, WarmedUp, go_on
from model_store.bundle.files import GOLDEN, NETWORK, UTILITY, Bundle, BundleError
from model_store.bundle.golden import GoldenRequest, decode_golden
from model_store.bundle.manifest import Manifest
from model_store.bundle.network_check import NetworkError, check_network
from model_store.model.assembly import Assembler

_ONE, _LOW, _HIGH = np.float32(1), np.float32(-80), np.float32(80)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """Everything a request needs of its model; requests hold it from admission to the end."""

    manifest: Manifest
    digest: str
    needs: FeatureNeeds
    assembler: Assembler
    engine: Engine
    utility_toml: bytes
    #: None where it was loaded without a warm-up.
    warmed_up: WarmedUp | None

    def bytes_of(self, rows: int) -> int:
        """Estimate the memory that a request of so many candidates holds from fetch to answer: features and tensors.

        An engine's own working memory is bounded by its streams, not by what waits.
        """
        request_bytes, row_bytes = self.manifest.request_bytes, self.manifest.row_bytes
        return request_bytes + rows * row_bytes

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrate float32[N, H] logits into float32[N, H] probabilities; a non-finite logit stays non-finite."""
        return calibrate(self.manifest, logits)


def calibrate(manifest: Manifest, logits: np.ndarray) -> np.ndarray:
    """Apply each head's logistic calibration: sigmoid(slope * logit + intercept)."""
    slope, intercept = manifest.calibration
    # Within these bounds exp stays finite in float32; an infinite logit is an engine fault and must stay visible.
    scaled = -(slope * logits + intercept)
    np.minimum(np.maximum(scaled, _LOW, out=scaled), _HIGH, out=scaled)
    np.exp(scaled, out=scaled)
    scaled += _ONE
    probabilities: np.ndarray = np.divide(_ONE, scaled, out=scaled)
    finite = np.isfinite(logits)
    if not finite.all():
        probabilities[~finite] = np.nan
    return probabilities


def load_model(
    bundle: Bundle,
    factory: EngineFactory,
    streams: int,
    *,
    warm: bool = True,
    plan: bytes | None = None,
    sample: FeatureBatch | None = None,
    pause: Callable[[], None] = lambda: None,
    progress: Progress = go_on,
) -> LoadedModel:
    """Compile a bundle, score its golden requests and warm it up.

    Args:
        bundle: as read.
        factory: of the engine.
        streams: runs in flight at once.
        warm: whether to warm up, and so to measure the cost of a run.
        plan: what the engine made of this very network in a process where it was proven.
        sample: recent requests to warm up on; the golden ones without.
        pause: called between the steps, none of which can be interrupted.
        progress: of the warm-up; bounds it.

    Raises:
        BundleError: the network cannot be compiled, or its golden scores differ by more than the manifest's tolerance,
            or the engine's where it computes in half precision; or a run of the warm-up failed.
        UnavailableError: the engine's runtime or device is not there.
    """
    manifest = bundle.manifest
    assembler = Assembler(manifest)
    try:
        if plan is None:
            check_network(bundle.files[NETWORK])
        golden = decode_golden(bundle.files[GOLDEN])
        if not golden:
            raise BundleError(f"{manifest.ref}: {GOLDEN} holds no request, so nothing proves what the network computes")
        engine = factory(bundle.files[NETWORK], manifest.specs, len(manifest.heads), streams, plan=plan)
        try:
            pause()
            proven = FeatureBatch.concat([assembler.assemble(g.fetched, g.surface) for g in golden])
            _verify(manifest, calibrate(manifest, engine.run(proven)), golden, engine.tolerance)
            pause()
            warmed_up = _warm(manifest, engine, proven, sample, progress) if warm else None
        except BaseException:
            engine.close()
            raise
    except UnavailableError:
        raise
    except (EngineError, NetworkError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{manifest.ref}: {error}") from error
    return LoadedModel(manifest, bundle.digest, manifest.needs, assembler, engine, bundle.files[UTILITY], warmed_up)


def _warm(
    manifest: Manifest, engine: Engine, golden: FeatureBatch, sample: FeatureBatch | None, progress: Progress
) -> WarmedUp:
    if sample is None:
        return engine.warm_up(golden, progress)
    try:
        return engine.warm_up(sample, progress)
    except UnavailableError:
        raise
    except EngineError as error:  # its text may quote a user's row
        raise BundleError(f"{manifest.ref}: {type(error).__name__} in a warm-up on recent requests") from error


def _verify(
    manifest: Manifest, probabilities: np.ndarray, golden: list[GoldenRequest], engine_tolerance: float
) -> None:
    expected = np.concatenate([g.probabilities for g in golden])
    if expected.shape != probabilities.shape:
        raise BundleError(
            f"{manifest.ref}: golden scores have shape {expected.shape}, the network gives {probabilities.shape}"
        )
    difference = np.abs(probabilities - expected)
    worst = float(np.max(np.where(np.isnan(difference), np.inf, difference)))
    tolerance = max(manifest.golden_tolerance, engine_tolerance)
    if worst > tolerance:
        row, head = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), difference.shape)
        raise BundleError(
            f"{manifest.ref}: golden row {row}, head {manifest.heads[int(head)].name!r}: expected probability "
            f"{expected[row, head]:.6f}, got {probabilities[row, head]:.6f} (tolerance {tolerance:g})"
        )
