"""Bundles made to harm whoever loads them: each is refused by name before anything runs it."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import BundleError, read_bundle
from model_store.model.loaded import load_model
from model_store.network.check import NetworkError, check_network
from tests import tiny

SPECS = tiny.manifest().specs


def edited(change):
    model = onnx.load_model_from_string(tiny.network())
    change(model)
    return model.SerializeToString()


def add_node(op_type, *, domain="", inputs=(), **attributes):
    return lambda model: model.graph.node.append(
        helper.make_node(op_type, list(inputs), ["unused"], domain=domain, **attributes)
    )


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"


def huge_claim(model):
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 40, 8])


def small_lie(model):
    model.graph.initializer[0].dims[0] += 1


def giant_result(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "giant"))
    add_node("ConstantOfShape", inputs=["giant"])(model)


def giant_result_of_a_constant(model):
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64))
    model.graph.node.append(helper.make_node("Constant", [], ["giant"], value=shape))
    add_node("ConstantOfShape", inputs=["giant"])(model)


def hidden_in_a_branch(model):
    inside = helper.make_graph([helper.make_node("Evil", [], ["x"], domain="acme")], "inside", [], [])
    model.graph.node.append(helper.make_node("Identity", ["query"], ["unused"], body=inside))


def circle(model):
    body = [helper.make_node("b", ["x"], ["y"], domain="f")]
    other = [helper.make_node("a", ["x"], ["y"], domain="f")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    for name, nodes in (("a", body), ("b", other)):
        model.functions.append(helper.make_function("f", name, ["x"], ["y"], nodes, opsets))


def stand_in(model):
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(
        helper.make_function("", "Relu", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], opsets)
    )


def twice(model):
    opsets = [helper.make_opsetid("", 18)]
    for _ in range(2):
        model.functions.append(
            helper.make_function("f", "a", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], opsets)
        )


def doubling(model):
    """Functions that call the one before twice each, 2**40 nodes in all."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    for i in range(40):
        call = "Neg" if i == 0 else f"f{i - 1}"
        nodes = [helper.make_node(call, [x], [y], domain="" if i == 0 else "f") for x, y in (("x", "m"), ("m", "y"))]
        model.functions.append(helper.make_function("f", f"f{i}", ["x"], ["y"], nodes, opsets))
    model.opset_import.append(helper.make_opsetid("f", 1))
    model.graph.node.append(helper.make_node("f39", ["query"], ["unused"], domain="f"))


def ends_in(*operators):
    """Put operators of one input behind what made the logits."""

    def change(model):
        last = next(node for node in model.graph.node if "logits" in node.output)
        last.output[list(last.output).index("logits")] = "before0"
        names = [*(f"before{place}" for place in range(len(operators))), "logits"]
        for operator, taken, given in zip(operators, names, names[1:], strict=False):
            attributes = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
            model.graph.node.append(helper.make_node(operator, [taken], [given], **attributes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "tensor w_pin has its data in another file"),
        (huge_claim, "tensor w_pin has 8,796,093,022,208 elements, the limit is"),
        (small_lie, r"tensor w_pin: its shape \[5, 2\] does not match its data"),
        (giant_result, r"holds 4,398,\d{3},\d{3},\d{3} bytes here, the limit is .*; the largest tensor is 'unused'"),
        (
            giant_result_of_a_constant,
            r"holds 4,398,\d{3},\d{3},\d{3} bytes here, the limit is .*; the largest tensor is 'unused'",
        ),
        (add_node("Evil", domain="acme"), "unknown operator acme.Evil"),
        (hidden_in_a_branch, "unknown operator acme.Evil"),
        (add_node("Relux", inputs=["query"]), "ONNX opset 18 has no operator Relux"),
        (add_node("Loop", inputs=["query"]), "operator Loop is not allowed"),
        (add_node("RandomNormal", shape=[2]), "operator RandomNormal is not allowed"),
        (circle, "functions call each other recursively"),
        (stand_in, "function .Relu stands in for an operator of the standard"),
        (twice, "function f.a is defined twice"),
        (doubling, r"the network has 1,099,\d{3},\d{3},\d{3} nodes with its functions' own"),
        (lambda m: m.graph.ClearField("node"), "it has no nodes"),
        (ends_in("Sigmoid"), "the output 'logits' comes from a Sigmoid, but must be logits: .* remove the Sigmoid"),
        (ends_in("Softmax", "Cast", "Identity"), "comes from a Softmax"),
    ],
)
def test_networks_that_harm_are_refused_by_name(tmp_path, change, message):
    content = edited(change)
    with pytest.raises(NetworkError, match=message):
        check_network(content, SPECS)
    tiny.write_tiny_bundle(tmp_path / "b", **{"network.onnx": content})
    with pytest.raises(BundleError, match=f"tiny@1: .*{message}"):
        load_model(read_bundle(tmp_path / "b"), NumpyEngine, streams=1)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x80\x04\x95pickle", b"\x0a" * 1000])
def test_what_is_no_network_is_refused(content):
    with pytest.raises(NetworkError, match="not an ONNX network"):
        check_network(content, SPECS)


def test_good_networks_pass():
    check_network(tiny.network(), SPECS)


@pytest.mark.parametrize("operators", [("Sigmoid", "Log"), ("Softmax", "Neg"), ("Cast", "Identity")])
def test_a_sigmoid_further_inside_is_the_networks_own_business(operators):
    check_network(edited(ends_in(*operators)), SPECS)


def archive(compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, content in members.items():
            opened.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def array(values, *, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


def claiming(shape):
    """A member whose header says that it is far larger than it is."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + b"\0" * 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(a=array(np.array([{}], object), allow_pickle=True)), "a.npy holds pickled objects"),
        (archive(zipfile.ZIP_DEFLATED, a=array(np.zeros(10_000_000))), "a zip bomb"),
        (archive(a=claiming((1 << 40,))), r"its header describes 4398046511104 bytes, 16 follow"),
        (archive(a=claiming((3,))), r"its header describes 12 bytes, 16 follow"),
        (archive(**{f"a{i}": array(np.zeros(100)) for i in range(20)}), "its arrays take 18,560 bytes, the limit is"),
        (archive(a=b"no array"), "magic string"),
        (b"PK\x03\x04", "not an archive of arrays"),
    ],
)
def test_archives_that_harm_are_refused_by_name(content, message):
    with pytest.raises(ValueError, match=message):
        decode_arrays(content, bytes_max=100_000_000 if "bomb" in message else 10_000)


def test_arrays_come_back_as_they_were_and_can_be_written_to():
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c": np.array("home"),
        "d": np.zeros(0, np.int64),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    found = decode_arrays(buffer.getvalue())
    for name, expected in arrays.items():
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype
    found["a"][0, 0] = 7


def test_links_in_a_bundles_folder_are_refused(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "b")
    secret = tmp_path / "secret"
    (tmp_path / "b" / "utility.toml").rename(secret)
    (tmp_path / "b" / "utility.toml").symlink_to(secret)
    with pytest.raises(BundleError, match=r"utility.toml: it is a link; a bundle must not contain links"):
        read_bundle(tmp_path / "b")


def test_a_bundle_beyond_the_limit_is_not_read(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "b")
    (tmp_path / "b" / "network.onnx").unlink()  # would be missed if it were read
    with pytest.raises(BundleError, match=r"tiny@1 has .* bytes, the limit is 1,000 \(bundle_bytes_max\)"):
        read_bundle(tmp_path / "b", bytes_max=1_000)
