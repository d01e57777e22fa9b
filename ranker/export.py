"""From a trained network to a bundle: ONNX, proof that the engines compute the same, golden requests, the manifest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from feature_client.fetcher import Fetched
from kernels.engine import LOGITS, ROW_REQUEST, EngineFactory, FeatureBatch
from kernels.numpy_engine import NumpyEngine
from kernels.openvino_engine import OpenVinoEngine
from model_store.assembly import Assembler
from model_store.bundle import EMBEDDINGS, GOLDEN, NETWORK, UTILITY, write_bundle
from model_store.golden import GoldenRequest, encode_golden
from model_store.live import calibrate
from model_store.manifest import Calibration, Lineage, Manifest
from ranker.actions import ActionSchema
from ranker.contract import manifest_fields
from ranker.embeddings import PinEmbeddings, encode_embeddings, space_of
from ranker.errors import ParityError
from ranker.model import RankerNetwork
from ranker.training import tensors

PARITY_TOLERANCE = 1e-4
OPSET = 20

_ENGINES: Mapping[str, EngineFactory] = {"numpy": NumpyEngine, "openvino": OpenVinoEngine}


@dataclass(frozen=True, slots=True)
class BundleParts:
    """Everything a bundle is made of, but the network."""

    name: str
    version: int
    dataset: str
    schema: ActionSchema
    heads: Sequence[str]
    calibrations: Sequence[Calibration]
    lineage: Lineage
    utility_toml: bytes
    embeddings: PinEmbeddings
    #: Invented requests with their surfaces; the expected scores are computed here.
    golden: Sequence[tuple[Fetched, str]]

    def manifest_fields(self, *, sequence: bool) -> dict[str, object]:
        return manifest_fields(
            self.name,
            self.version,
            space_of(self.dataset),
            self.schema,
            self.heads,
            self.lineage,
            sequence=sequence,
            calibrations=self.calibrations,
        )


def export_bundle(folder: Path, network: RankerNetwork, parts: BundleParts) -> Manifest:
    """Write a bundle into a folder that does not exist yet.

    Raises:
        ParityError: an engine disagrees with PyTorch; nothing is written.
    """
    fields = parts.manifest_fields(sequence=network.config.sequence)
    draft = Manifest.model_validate({**fields, "files": {}})
    assembler = Assembler(draft)
    batch = FeatureBatch.concat([assembler.assemble(fetched, surface) for fetched, surface in parts.golden])
    content = export_onnx(network, batch)
    logits = check_parity(network, content, draft, batch)
    probabilities = np.split(calibrate(draft, logits), batch.row_splits[1:-1])
    golden = [
        GoldenRequest(fetched, surface, scores)
        for (fetched, surface), scores in zip(parts.golden, probabilities, strict=True)
    ]
    files = {
        NETWORK: content,
        UTILITY: parts.utility_toml,
        GOLDEN: encode_golden(golden),
        EMBEDDINGS: encode_embeddings(parts.embeddings),
    }
    return write_bundle(folder, fields, files)


def export_onnx(network: RankerNetwork, sample: FeatureBatch) -> bytes:
    """Export with the number of requests and of rows left open; the same weights give the same bytes.

    Args:
        network: in evaluation mode.
        sample: a batch of at least two requests and more rows than requests, so that no size is taken for a constant.
    """
    arguments = tensors(sample)
    requests, rows = torch.export.Dim("requests"), torch.export.Dim("rows")
    shapes = {name: {0: requests if name in sample.request else rows} for name in arguments}
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        # The exporter's own internals use parts of PyTorch and of copyreg that are being retired.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        program = torch.onnx.export(
            network.eval(),
            (),
            kwargs=arguments,
            input_names=list(arguments),
            output_names=[LOGITS],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ParityError("the exporter returned no network")
    return _stripped(program.model_proto)


def check_parity(network: RankerNetwork, content: bytes, manifest: Manifest, batch: FeatureBatch) -> np.ndarray:
    """Return the reference's logits, float32[N, H], once every engine agrees with PyTorch within `PARITY_TOLERANCE`.

    Raises:
        ParityError: which engine differs, and by how much.
    """
    with torch.inference_mode():
        expected: np.ndarray = network.eval()(**tensors(batch)).numpy()
    logits: dict[str, np.ndarray] = {}
    for name, factory in _ENGINES.items():
        engine = factory(content, manifest.specs, len(manifest.heads), 1)
        try:
            logits[name] = engine.run(batch)
        finally:
            engine.close()
        difference = float(np.max(np.abs(logits[name] - expected)))
        if not difference <= PARITY_TOLERANCE:
            raise ParityError(f"the {name} engine's logits differ by {difference:g}, allowed are {PARITY_TOLERANCE:g}")
    return logits["numpy"]


def _stripped(model: onnx.ModelProto) -> bytes:
    """Drop what the exporter notes beside the network: source lines and stack traces, with this machine's paths."""
    model.producer_version = ""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    holders: tuple[Any, ...] = (model, graph, *graph.node, *values, *graph.initializer, *model.functions)
    for holder in holders:
        del holder.metadata_props[:]
        holder.doc_string = ""
    onnx.checker.check_model(model)
    named = {value.name for value in model.graph.input}
    if ROW_REQUEST not in named:
        raise ParityError(f"the exported network takes {sorted(named)}, without {ROW_REQUEST!r}")
    stripped: bytes = model.SerializeToString(deterministic=True)
    return stripped


class _quiet:  # noqa: N801 - reads as a verb where it is used
    """Hold back loggers that report progress as if it were trouble."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
