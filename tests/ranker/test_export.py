from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch

from kernels.engine import EngineError, FeatureBatch, Side, TensorSpec
from kernels.fused_encoder import FusedEncoder, instruction_sets
from kernels.fusion import DOMAIN, ENCODER, parse, take_out_encoder
from kernels.numpy_engine import NumpyEngine
from kernels.openvino_engine import OpenVinoEngine
from ranker.export import Form, export_encoder, export_onnx
from ranker.minibatches import tensors
from ranker.model import FUSIONS, Fusion, NetworkConfig, RankerNetwork

LENGTH = 30


def batch(fills: tuple[int, ...] = (LENGTH, 0, 7), rows: int = 11) -> FeatureBatch:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)

    requests = len(fills)
    actions = rng.integers(1, 5, (requests, LENGTH))
    actions[np.arange(LENGTH) >= np.array(fills)[:, None]] = 0
    request = {
        "user_embedding": normal(requests, 32),
        "user_scalars": normal(requests, 4),
        "surface": rng.integers(0, 2, requests),
        "query": normal(requests, 32),
        "sequence_actions": actions,
        "sequence_embeddings": normal(requests, LENGTH, 32),
    }
    candidate = {"pin_embedding": normal(rows, 32), "pin_scalars": normal(rows, 4)}
    return FeatureBatch(request, candidate, np.linspace(0, rows, requests + 1).astype(np.int32))


def read_by(fusion: Fusion, whole: FeatureBatch) -> tuple[FeatureBatch, list[TensorSpec]]:
    """Return the batch as a network of this fusion takes it, and what its manifest would say of it."""
    request = {n: a for n, a in whole.request.items() if fusion != "none" or not n.startswith("sequence_")}
    sides: list[tuple[Side, dict[str, np.ndarray]]] = [("request", request), ("candidate", dict(whole.candidate))]
    specs = [TensorSpec(n, side, a.dtype.name, a.shape[1:]) for side, held in sides for n, a in held.items()]
    return FeatureBatch(request, whole.candidate, whole.row_splits), specs


def network(fusion: Fusion = "early", **sizes: int) -> RankerNetwork:
    torch.manual_seed(2)
    return RankerNetwork(NetworkConfig(heads=3, actions=4, surfaces=2, scalars=4, fusion=fusion, **sizes)).eval()  # type: ignore[arg-type]


@cache
def exported() -> bytes:
    """Return the early-fused network in its serving form; exporting takes seconds."""
    return export_onnx(network(), batch())


@pytest.mark.parametrize(
    ("fusion", "form"), [*((fusion, "serving") for fusion in FUSIONS), ("early", "published"), ("cross", "published")]
)
def test_every_variant_exports_and_computes_what_is_published(fusion: Fusion, form: Form) -> None:
    trained = network(fusion)
    taken, specs = read_by(fusion, batch())
    content = export_onnx(trained, taken, form)
    with torch.inference_mode():
        expected = trained.published(**tensors(taken)).numpy()
    for engine in (NumpyEngine(content, specs, 3), OpenVinoEngine(content, specs, 3)):
        np.testing.assert_allclose(engine.run(taken), expected, atol=1e-4)
        native = isinstance(engine, OpenVinoEngine) and fusion == "early" and form == "serving"
        assert engine.kernel == (instruction_sets()[-1] if native else "none")


@pytest.mark.parametrize(("fills", "rows"), [((LENGTH,), 1), ((3, LENGTH), 200), ((0,), 5), ((5, 5, 5, 5), 9)])
def test_the_kernel_and_openvino_alone_compute_the_same(fills: tuple[int, ...], rows: int) -> None:
    _, specs = read_by("early", batch())
    taken = batch(fills, rows)
    with_kernel, alone = OpenVinoEngine(exported(), specs, 3), OpenVinoEngine(exported(), specs, 3, native=False)
    assert (with_kernel.kernel, alone.kernel) == (instruction_sets()[-1], "none")
    np.testing.assert_allclose(with_kernel.run(taken), alone.run(taken), atol=1e-4)


def test_an_encoder_that_the_kernel_is_not_made_for_runs_in_openvino() -> None:
    taken, specs = read_by("early", batch())
    deeper = network(encoder_layers=3)
    engine = OpenVinoEngine(export_onnx(deeper, taken), specs, 3)
    assert engine.kernel == "none"
    with torch.inference_mode():
        np.testing.assert_allclose(engine.run(taken), deeper.published(**tensors(taken)).numpy(), atol=1e-4)


def test_the_file_defines_the_function_that_it_calls() -> None:
    model = parse(exported())
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, ENCODER)]
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == [ENCODER]


def test_a_call_whose_weights_are_computed_is_left_to_the_runtime() -> None:
    _, specs = read_by("early", batch())
    model = parse(exported())
    assert take_out_encoder(model, specs) is not None
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "encoder.acted")
    weight.name = "stored"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["stored"], ["encoder.acted"]))
    assert take_out_encoder(model, specs) is None


def test_a_call_of_another_form_or_of_no_plain_inputs_is_left_to_the_runtime() -> None:
    _, specs = read_by("early", batch())
    later = parse(exported())
    call = next(node for node in later.graph.node if node.domain == DOMAIN)
    next(a for a in call.attribute if a.name == "form").i = 2
    assert take_out_encoder(later, specs) is None
    bare = parse(exported())
    del next(node for node in bare.graph.node if node.domain == DOMAIN).attribute[:]
    assert take_out_encoder(bare, specs) is None
    copied = parse(exported())
    copied.graph.node.insert(0, onnx.helper.make_node("Identity", ["pin_embedding"], ["copied"]))
    next(node for node in copied.graph.node if node.domain == DOMAIN).input[2] = "copied"
    assert take_out_encoder(copied, specs) is None


@pytest.mark.parametrize("name", ["candidate", "candidate_bias", "layer2_hidden_bias", "layer2_norm_out"])
def test_weights_that_do_not_fit_never_reach_the_kernel(name: str) -> None:
    _, specs = read_by("early", batch())
    call = take_out_encoder(parse(exported()), specs)
    assert call is not None
    with pytest.raises(EngineError, match="do not fit"):
        FusedEncoder({**call.weights, name: call.weights[name][..., :4]}, call.shape)
    with pytest.raises(EngineError, match="no encoder's weights"):
        FusedEncoder({n: w for n, w in call.weights.items() if n != "layer1_hidden"}, call.shape)


def test_the_published_encoder_exports_alone() -> None:
    trained = network()
    assert trained.encoder is not None
    content = export_encoder(trained, batch())
    names = ("sequence_actions", "sequence_embeddings", "pin_embedding", "row_request")
    given = {name: value for name, value in tensors(batch()).items() if name in names}
    found = onnx.reference.ReferenceEvaluator(parse(content)).run(None, {n: v.numpy() for n, v in given.items()})
    with torch.inference_mode():
        expected = trained.encoder(*(given[name] for name in names)).numpy()
    np.testing.assert_allclose(found[0], expected, atol=1e-4)  # type: ignore[index]
