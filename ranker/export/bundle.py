"""Export of a trained network as a bundle: ONNX, a parity check of the engines, golden requests, the manifest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from feature_client.features import FetchedFeatures
from feature_client.groups import FeatureGroup
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.engine import LOGITS, ROW_REQUEST, EngineFactory, FeatureBatch
from kernels.fusion import DOMAIN, ENCODED, ENCODER, ENCODER_INPUTS, FORM, replace
from model_store.bundle.files import (
    EMBEDDINGS,
    EXPLORATION,
    GOLDEN,
    NETWORK,
    PARAMETERS,
    STATISTICS,
    USERS,
    UTILITY,
    write_bundle,
)
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.bundle.manifest import Calibration, Lineage, Manifest
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from ranker.data.actions import ActionSchema
from ranker.data.atomic.described import Described
from ranker.data.embeddings import PinEmbeddings, encode_embeddings
from ranker.data.users.rows import UserEncoder
from ranker.errors import ParityError
from ranker.export.manifest import manifest_fields
from ranker.network.encoder import EPSILON, EarlyFusion
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.network.serving_form import early_readout, fold_early
from ranker.training.minibatches import tensors
from ranker.training.parent import encode_parameters

#: Largest difference of a logit: absolute for logits up to 1, relative above.
PARITY_TOLERANCE = 1e-4
OPSET = 20

Form = Literal["serving", "published"]

#: The input of the network for each input of the encoder's function that is not a weight.
_ROLES = dict(
    zip(ENCODER_INPUTS, ("sequence_actions", "sequence_embeddings", "pin_embedding", ROW_REQUEST), strict=True)
)

_ENGINES: Mapping[str, EngineFactory] = {"numpy": NumpyEngine, "openvino": OpenVinoEngine}


@dataclass(frozen=True, slots=True)
class BundleParts:
    """All parts of a bundle except the network."""

    name: str
    version: int
    groups: tuple[FeatureGroup, ...]
    schema: ActionSchema
    described: Described
    heads: Sequence[str]
    calibrations: Sequence[Calibration]
    lineage: Lineage
    utility_toml: bytes
    embeddings: PinEmbeddings
    #: Synthetic requests with their surfaces; the export computes their expected scores.
    golden: Sequence[tuple[FetchedFeatures, str]]
    #: How many of the user's last actions the network reads.
    sequence_length: int
    #: Statistics of the validation rows, as JSON.
    statistics: bytes
    #: Empty for a bundle without exploration.
    explore_toml: bytes = b""
    #: The network that makes the users' vectors; None for a ranker that reads none.
    users: UserEncoder | None = None

    def manifest_fields(self, network: NetworkConfig) -> dict[str, object]:
        fields = manifest_fields(
            self.name,
            self.version,
            self.embeddings.space,
            self.schema,
            self.heads,
            self.lineage,
            sequence_length=self.sequence_length,
            similarities=network.similarities > 0,
            recency=network.recency > 0,
            interests=network.interests,
            users=None if self.users is None else self.users.space,
            described=self.described,
            calibrations=self.calibrations,
        )
        return fields | {"groups": self.groups}


def export_bundle(folder: Path, network: RankerNetwork, parts: BundleParts) -> Manifest:
    """Write a bundle to a folder that does not exist yet.

    Raises:
        ParityError: an engine disagrees with PyTorch; no bundle is written.
    """
    fields = parts.manifest_fields(network.config)
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
        STATISTICS: parts.statistics,
        PARAMETERS: encode_parameters(network),
    }
    if parts.explore_toml:
        files[EXPLORATION] = parts.explore_toml
    if parts.users is not None:
        files[USERS] = parts.users.content
    return write_bundle(folder, fields, files)


def export_onnx(network: RankerNetwork, sample: FeatureBatch, form: Form = "serving") -> bytes:
    """Export with variable numbers of requests and rows; equal weights give equal bytes.

    Args:
        network: the network; it is set to evaluation mode.
        sample: a batch with at least two requests and more rows than requests, so that no size is taken for a constant.
        form: `serving` is the form in bundles; `published` computes every row with the plain modules, as the oracle.
    """
    network = network.eval()
    arguments = tensors(sample)
    if form == "published":
        model = _exported(_TracedModule(network, lambda inputs: network.published(**inputs)), arguments, sample)
    elif isinstance(network.encoder, EarlyFusion) and not network.config.readout_pool:
        model = _with_encoder_function(network, arguments, sample)
    else:
        model = _exported(_TracedModule(network, lambda inputs: network(**inputs)), arguments, sample)
    return _stripped(model)


def export_encoder(network: RankerNetwork, sample: FeatureBatch) -> bytes:
    """Export only the published encoder, with float32[N, W] as `logits`, to compare the serving form with it."""
    encoder = network.eval().encoder
    if encoder is None:
        raise ParityError("this network reads no sequence, so it has no encoder to export")
    arguments = {name: value for name, value in tensors(sample).items() if name in _ROLES.values()}
    way = _TracedModule(network, lambda inputs: encoder(*(inputs[name] for name in _ROLES.values())))
    return _stripped(_exported(way, arguments, sample))


class _TracedModule(nn.Module):
    """Wraps a function of a module, from named tensors to one tensor, as an exportable module."""

    def __init__(self, module: nn.Module, way: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._way = way

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._way(inputs)


def _with_encoder_function(
    network: RankerNetwork, arguments: Mapping[str, Tensor], sample: FeatureBatch
) -> onnx.ModelProto:
    """Export the encoder as an ONNX function, and the rest of the network around a call to it."""
    assert isinstance(network.encoder, EarlyFusion)  # noqa: S101 - the caller checks
    layers, rows = network.config.encoder_layers, network.config.readout_rows

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        read = [inputs[role] for role in ENCODER_INPUTS]
        return early_readout(inputs, *read, layers=layers, rows=rows).flatten(1)

    def score(inputs: dict[str, Tensor]) -> Tensor:
        return network.score(**{name: value for name, value in inputs.items() if name != ENCODED}, read=inputs[ENCODED])

    with torch.no_grad():
        weights = {name: weight.clone() for name, weight in fold_early(network.encoder).items()}
        taken = {role: arguments[name] for role, name in _ROLES.items()} | weights
        others = {name: value for name, value in arguments.items() if not name.startswith("sequence_")}
        others[ENCODED] = encode(taken)
    body = _exported(_TracedModule(nn.Module(), encode), taken, sample)
    model = _exported(_TracedModule(network, score), others, sample)
    function = helper.make_function(
        DOMAIN,
        ENCODER,
        [value.name for value in body.graph.input],
        [value.name for value in body.graph.output],
        [*(helper.make_node("Constant", [], [t.name], value=t) for t in body.graph.initializer), *body.graph.node],
        list(body.opset_import),
        ["form", "layers", "rows", "epsilon"],
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    prefixed = {name: f"encoder.{name}" for name in weights}
    call = helper.make_node(
        ENCODER,
        [*_ROLES.values(), *(prefixed[name] for name in function.input[len(_ROLES) :])],
        [ENCODED],
        domain=DOMAIN,
        form=FORM,
        layers=layers,
        rows=rows,
        epsilon=EPSILON,
    )
    graph = model.graph
    given = {value.name: value for value in graph.input}
    for value in body.graph.input:
        if value.name in _ROLES:
            value.name = _ROLES[value.name]
            given.setdefault(value.name, value)
    graph.value_info.append(given[ENCODED])
    replace(graph.node, [call, *graph.node])
    replace(graph.input, [given[name] for name in arguments])
    graph.initializer.extend(numpy_helper.from_array(w.numpy(), prefixed[name]) for name, w in weights.items())
    return model


def _exported(module: nn.Module, arguments: Mapping[str, Tensor], sample: FeatureBatch) -> onnx.ModelProto:
    """Trace a module with a variable first dimension of all tensors of a batch; weights keep their shapes."""
    requests, rows = torch.export.Dim("requests"), torch.export.Dim("rows")
    leading = dict.fromkeys(sample.request, requests) | dict.fromkeys((*sample.candidate, ROW_REQUEST, ENCODED), rows)
    leading |= {role: leading[name] for role, name in _ROLES.items() if name in leading}
    shapes = {name: {0: leading[name]} if name in leading else None for name in arguments}
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        # The exporter itself uses deprecated parts of PyTorch and copyreg.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        program = torch.onnx.export(
            module.eval(),
            (),  # a dictionary alone in this place would be taken for keyword arguments
            kwargs={"inputs": dict(arguments)},
            input_names=list(arguments),
            output_names=[LOGITS],
            dynamic_shapes={"inputs": shapes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ParityError("the ONNX exporter returned no network")
    return program.model_proto


def check_parity(network: RankerNetwork, content: bytes, manifest: Manifest, batch: FeatureBatch) -> np.ndarray:
    """Check that every engine agrees with the published form in PyTorch; return the reference logits, float32[N, H].

    Raises:
        ParityError: names the engine and its difference.
    """
    with torch.inference_mode():
        expected: np.ndarray = network.eval().published(**tensors(batch)).numpy()
    logits: dict[str, np.ndarray] = {}
    for name, factory in _ENGINES.items():
        engine = factory(content, manifest.specs, len(manifest.heads), 1)
        try:
            logits[name] = engine.run(batch)
        finally:
            engine.close()
        # Synthetic requests may lie far from the data and give logits in the hundreds; float32 has seven digits.
        difference = float(np.max(np.abs(logits[name] - expected) / np.maximum(1.0, np.abs(expected))))
        if not difference <= PARITY_TOLERANCE:
            raise ParityError(
                f"the logits of the {name} engine differ by {difference:g}, more than the allowed {PARITY_TOLERANCE:g}"
            )
    return logits["numpy"]


def _stripped(model: onnx.ModelProto) -> bytes:
    """Remove the exporter's notes: source lines and stack traces that contain paths of this machine."""
    model.producer_version = ""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    holders: tuple[Any, ...] = (model, graph, *nodes, *values, *graph.initializer, *model.functions)
    for holder in holders:
        del holder.metadata_props[:]
        holder.doc_string = ""
    onnx.checker.check_model(model)
    named = {value.name for value in model.graph.input}
    if ROW_REQUEST not in named:
        raise ParityError(f"the exported network has the inputs {sorted(named)}, but not {ROW_REQUEST!r}")
    stripped: bytes = model.SerializeToString(deterministic=True)
    return stripped


class _quiet:  # noqa: N801 - reads as a verb where it is used
    """Silence loggers that report progress as warnings."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
