"""Load a bundle: compile its network, verify it on the golden requests, and warm it up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from feature_client.groups import FeatureNeeds
from kernels.engine import Engine, EngineError, EngineFactory, FeatureBatch, Progress, UnavailableError, WarmedUp, go_on
from model_store.bundle.files import GOLDEN, NETWORK, UTILITY, Bundle, BundleError
from model_store.bundle.golden import GoldenRequest, decode_golden, query_norm_max
from model_store.bundle.manifest import Manifest
from model_store.model.assembly import Assembler
from model_store.model.logistic import Logistic
from model_store.model.products import Products, choose_products
from model_store.network.check import NetworkError, RunLimits, check_network

_LIMITS = RunLimits()


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that can score requests. Each request holds it from admission until its answer."""

    manifest: Manifest
    digest: str
    needs: FeatureNeeds
    assembler: Assembler
    logistic: Logistic
    engine: Engine
    utility_toml: bytes
    #: None if the model was loaded without a warm-up.
    warmed_up: WarmedUp | None
    products: Products
    #: Largest Euclidean norm of a caller's query vector.
    query_norm_max: float

    def bytes_of(self, rows: int) -> int:
        """Estimate the bytes of features and tensors that a request with this many candidates holds until its answer.

        The engine's working memory is not included: it depends on the streams, not on the waiting requests.
        """
        request_bytes, row_bytes = self.manifest.request_bytes, self.manifest.row_bytes
        return request_bytes + rows * row_bytes

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrate logits, float32[N, H], into probabilities, float32[N, H]. A non-finite logit gives NaN."""
        return self.logistic(logits)


def calibrate(manifest: Manifest, logits: np.ndarray) -> np.ndarray:
    """Apply each head's logistic calibration: sigmoid(slope * logit + intercept). A non-finite logit gives NaN."""
    return Logistic(*manifest.calibration)(logits)


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
    limits: RunLimits = _LIMITS,
) -> LoadedModel:
    """Compile a bundle's network, verify its golden scores, choose the encoder's products and warm it up.

    The golden scores are verified in float32 (on GPUs in half precision), within the larger of the manifest's and the
    engine's tolerance. If the engine was opened for products of fewer bits, they must also be within the manifest's
    tolerance with those, or float32 stays.

    Args:
        bundle: a verified bundle.
        factory: opens the engine.
        streams: number of concurrent runs.
        warm: whether to choose the products and warm up, and thereby measure the cost of a run.
        plan: the compiled network (`Engine.plan`), from a process that has verified it.
        sample: recent requests to warm up on; the golden requests if None.
        pause: called between the steps; a step cannot be interrupted.
        progress: called during the warm-up, and can end it.
        limits: the largest run that the network must be fit for.

    Raises:
        BundleError: the network is refused (`check_network`) or cannot be compiled; a golden score differs by more than
            the larger of the manifest's and the engine's tolerance; or a run of the warm-up failed.
        UnavailableError: the engine's runtime or device is missing.
    """
    manifest = bundle.manifest
    assembler, logistic = Assembler(manifest), Logistic(*manifest.calibration)
    try:
        if plan is None:
            check_network(bundle.files[NETWORK], manifest.specs, limits)
        golden = decode_golden(bundle.files[GOLDEN])
        if not golden:
            raise BundleError(f"{manifest.ref}: {GOLDEN} contains no request, so the network cannot be verified")
        norm_max = query_norm_max(manifest, golden)
        engine = factory(bundle.files[NETWORK], manifest.specs, len(manifest.heads), streams, plan=plan)
        try:
            pause()
            proven = FeatureBatch.concat([assembler.assemble(g.fetched, g.surface) for g in golden])
            probabilities = logistic(engine.run(proven))
            tolerance = max(manifest.golden_tolerance, engine.tolerance)
            if wrong := _golden_fault(manifest, probabilities, golden, tolerance):
                raise BundleError(f"{manifest.ref}: {wrong}")
            pause()

            def fault() -> str | None:
                return _golden_fault(manifest, logistic(engine.run(proven)), golden, manifest.golden_tolerance)

            products, warmed_up = Products.of(engine), None
            if warm:
                with _unquoted(manifest, sample):
                    fitting = proven if sample is None else sample
                    products = choose_products(engine, fault, fitting, pause)
                    warmed_up = engine.warm_up(fitting, progress)
        except BaseException:
            engine.close()
            raise
    except UnavailableError:
        raise
    except (EngineError, NetworkError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{manifest.ref}: {error}") from error
    return LoadedModel(
        manifest,
        bundle.digest,
        assembler.needs,
        assembler,
        logistic,
        engine,
        bundle.files[UTILITY],
        warmed_up,
        products,
        norm_max,
    )  # fmt: skip


@contextmanager
def _unquoted(manifest: Manifest, recent: FeatureBatch | None) -> Iterator[None]:
    """Replace an engine's error on recent requests by one without its text, which may quote a user's row."""
    try:
        yield
    except UnavailableError:
        raise
    except EngineError as error:
        if recent is None:
            raise
        raise BundleError(f"{manifest.ref}: {type(error).__name__} during the warm-up on recent requests") from error


def _golden_fault(
    manifest: Manifest, probabilities: np.ndarray, golden: list[GoldenRequest], tolerance: float
) -> str | None:
    """Say which golden score is off by more than the tolerance, the worst one; None if none is."""
    expected = np.concatenate([g.probabilities for g in golden])
    if expected.shape != probabilities.shape:
        return f"the golden scores have shape {expected.shape}, the network's {probabilities.shape}"
    difference = np.abs(probabilities - expected)
    worst = float(np.max(np.where(np.isnan(difference), np.inf, difference)))
    if worst <= tolerance:
        return None
    row, head = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), difference.shape)
    return (
        f"golden row {row}, head {manifest.heads[int(head)].name!r}: expected probability "
        f"{expected[row, head]:.6f}, got {probabilities[row, head]:.6f} (tolerance {tolerance:g})"
    )
