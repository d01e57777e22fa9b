from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.cpu.openvino_engine import OpenVinoEngine
from kernels.encoder import FusedEncoder, has_instruction, instruction_sets
from kernels.engine import EngineError
from kernels.fusion import DOMAIN, ENCODER, parse, take_out_encoder
from ranker.export.bundle import Form, export_encoder, export_onnx
from ranker.network.model import Fusion
from ranker.training.minibatches import tensors
from tests.ranker.exported import FORMS, LENGTH, batch, exported, network, read_by


@pytest.mark.parametrize(("fusion", "form"), FORMS)
def test_every_variant_exports_and_computes_what_is_published(fusion: Fusion, form: Form) -> None:
    taken, _ = read_by(fusion, batch())
    content, specs = exported(fusion, form)
    trained = network(fusion)
    with torch.inference_mode():
        expected = trained.published(**tensors(taken)).numpy()
    for engine in (NumpyEngine(content, specs, 3), OpenVinoEngine(content, specs, 3)):
        np.testing.assert_allclose(engine.run(taken), expected, atol=1e-4)
        native = isinstance(engine, OpenVinoEngine) and fusion == "early" and form == "serving"
        assert engine.kernel == (instruction_sets()[-1] if native else "none")


@pytest.mark.parametrize("fusion", ["none", "late", "early"])
def test_vectors_of_which_only_the_first_numbers_are_crossed_compute_the_same(fusion: Fusion) -> None:
    taken, specs = read_by(fusion, batch())
    trained = network(fusion, crossed_dim=8)
    content = export_onnx(trained, taken)
    with torch.inference_mode():
        expected = trained.published(**tensors(taken)).numpy()
    for engine in (NumpyEngine(content, specs, 3), OpenVinoEngine(content, specs, 3)):
        np.testing.assert_allclose(engine.run(taken), expected, atol=1e-4)


@pytest.mark.parametrize(("fills", "rows"), [((LENGTH,), 1), ((3, LENGTH), 200), ((0,), 5), ((5, 5, 5, 5), 9)])
def test_the_kernel_and_openvino_alone_compute_the_same(fills: tuple[int, ...], rows: int) -> None:
    _, specs = read_by("early", batch())
    taken = batch(fills, rows)
    with_kernel, alone = OpenVinoEngine(exported()[0], specs, 3), OpenVinoEngine(exported()[0], specs, 3, native=False)
    assert (with_kernel.kernel, alone.kernel) == (instruction_sets()[-1], "none")
    np.testing.assert_allclose(with_kernel.run(taken), alone.run(taken), atol=1e-4)


def test_an_engine_multiplies_bf16_once_it_is_told_to_and_float32_again() -> None:
    content, specs = exported()[0], read_by("early", batch())[1]
    taken = batch((LENGTH, 3), 40)
    engine, plain = OpenVinoEngine(content, specs, 3, products="bf16"), OpenVinoEngine(content, specs, 3)
    expected = plain.run(taken)
    np.testing.assert_array_equal(engine.run(taken), expected)
    if not has_instruction("bf16"):
        assert "no instruction for products of bf16" in engine.products_lacking
        return
    engine.multiply("bf16")
    rounded = engine.run(taken)
    assert engine.kernel == instruction_sets("bf16")[-1]
    assert 0 < np.abs(rounded - expected).max() < 0.05
    engine.multiply("float32")
    np.testing.assert_array_equal(engine.run(taken), expected)


def test_an_engine_says_why_it_cannot_multiply_bf16() -> None:
    taken, specs = read_by("early", batch())
    deeper = OpenVinoEngine(export_onnx(network(encoder_layers=3), taken), specs, 3, products="bf16")
    for engine in (deeper, OpenVinoEngine(exported()[0], specs, 3, native=False, products="bf16")):
        assert "does not compute this network's encoder" in engine.products_lacking
        with pytest.raises(EngineError, match="nothing itself, not bf16"):
            engine.multiply("bf16")


def test_an_encoder_that_the_kernel_is_not_made_for_runs_in_openvino() -> None:
    taken, specs = read_by("early", batch())
    deeper = network(encoder_layers=3)
    engine = OpenVinoEngine(export_onnx(deeper, taken), specs, 3)
    assert engine.kernel == "none"
    with torch.inference_mode():
        np.testing.assert_allclose(engine.run(taken), deeper.published(**tensors(taken)).numpy(), atol=1e-4)


def test_the_file_defines_the_function_that_it_calls() -> None:
    model = parse(exported()[0])
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, ENCODER)]
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == [ENCODER]


def test_a_call_whose_weights_are_computed_is_left_to_the_runtime() -> None:
    _, specs = read_by("early", batch())
    model = parse(exported()[0])
    assert take_out_encoder(model, specs) is not None
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "encoder.acted")
    weight.name = "stored"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["stored"], ["encoder.acted"]))
    assert take_out_encoder(model, specs) is None


def test_a_call_of_another_form_or_of_no_plain_inputs_is_left_to_the_runtime() -> None:
    _, specs = read_by("early", batch())
    later = parse(exported()[0])
    call = next(node for node in later.graph.node if node.domain == DOMAIN)
    next(a for a in call.attribute if a.name == "form").i = 2
    assert take_out_encoder(later, specs) is None
    bare = parse(exported()[0])
    del next(node for node in bare.graph.node if node.domain == DOMAIN).attribute[:]
    assert take_out_encoder(bare, specs) is None
    copied = parse(exported()[0])
    copied.graph.node.insert(0, onnx.helper.make_node("Identity", ["pin_embedding"], ["copied"]))
    next(node for node in copied.graph.node if node.domain == DOMAIN).input[2] = "copied"
    assert take_out_encoder(copied, specs) is None


@pytest.mark.parametrize("name", ["candidate", "candidate_bias", "layer2_hidden_bias", "layer2_norm_out"])
def test_weights_that_do_not_fit_never_reach_the_kernel(name: str) -> None:
    _, specs = read_by("early", batch())
    call = take_out_encoder(parse(exported()[0]), specs)
    assert call is not None
    with pytest.raises(EngineError, match="weights are inconsistent"):
        FusedEncoder({**call.weights, name: call.weights[name][..., :4]}, call.shape)
    with pytest.raises(EngineError, match="not the weights of an encoder"):
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
