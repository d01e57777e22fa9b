"""A run's memory has a bound that the file tells: sizes follow from constants and shapes, and never from data."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import ROW_REQUEST, FeatureBatch
from model_store.bundle.files import BundleError, read_bundle
from model_store.model.assembly import Assembler
from model_store.model.loaded import load_model
from model_store.network import operator_sizes
from model_store.network.check import NetworkError, RunLimits, check_network
from tests import tiny

SPECS = tiny.manifest().specs
TABLES = ("REFUSED", "COUNTING", "SIZED", "DIVIDING", "FOLLOWING")


def network(*nodes, **constants):
    """A network of a few inputs of the tiny one, with nodes beside its own, and constants of int64 or float32."""
    whole = onnx.load_model_from_string(tiny.network()).graph
    inputs = [value for value in whole.input if value.name in {"pin_embedding", "query", "surface", "sequence"}]
    arrays = {name: np.array(values) for name, values in {"weights": [[1.0, 2.0]] * 4, **constants}.items()}
    kinds = {"i": np.int64, "f": np.float32}
    tensors = [numpy_helper.from_array(array.astype(kinds[array.dtype.kind]), n) for n, array in arrays.items()]
    logits = helper.make_node("MatMul", ["pin_embedding", "weights"], ["logits"])
    graph = helper.make_graph([*nodes, logits], "small", inputs, whole.output, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def make(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def test_every_operator_of_the_standard_is_in_one_table():
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    tables = {name: set(getattr(operator_sizes, name)) for name in TABLES}
    for operator in names:
        assert sum(operator in table for table in tables.values()) == 1, operator
    assert set().union(*tables.values()) <= names


def test_the_places_of_sizes_exist_and_those_that_may_vary_are_among_them():
    for operator, places in operator_sizes.SIZED.items():
        most = max(len(s.inputs) for s in onnx.defs.get_all_schemas_with_history() if s.name == operator)
        assert max(places) < most, operator
        assert set(operator_sizes.MAY_VARY.get(operator, ())) <= set(places)
    assert operator_sizes.CLIPPING | operator_sizes.MAY_VARY.keys() <= operator_sizes.SIZED.keys()
    assert not operator_sizes.CLIPPING & operator_sizes.MAY_VARY.keys()


def test_an_operator_that_no_table_knows_is_refused(monkeypatch):
    monkeypatch.setattr(
        "model_store.network.sizes.FOLLOWING", operator_sizes.FOLLOWING - {"Erf"}
    )  # as if ONNX had just brought it
    with pytest.raises(NetworkError, match="operator Erf is not allowed"):
        check_network(network(make("Erf", "query", "unused")), SPECS)


def counted_by(*nodes):
    """A ConstantOfShape as large as what the nodes make of the query: proven at some MB, and at 1e5 it takes GB."""
    return network(*nodes, make("ConstantOfShape", "count", "zeros"), all=[0, 1], one=[1], threshold=0.0)


#: How many numbers of the query are above 0, as a size.
GREATER = (
    make("Greater", "query threshold", "above"),
    make("Cast", "above", "ones", to=TensorProto.INT64),
    make("ReduceSum", "ones all", "total", keepdims=0),
    make("Reshape", "total one", "count"),
)
MAGNITUDE = (
    make("ReduceMax", "query", "largest", keepdims=0),
    make("Cast", "largest", "total", to=TensorProto.INT64),
    make("Reshape", "total one", "count"),
)


def test_a_size_that_counts_the_query_is_refused_by_operator_and_tensor(tmp_path):
    content = counted_by(*GREATER)
    message = "node 'ConstantOfShape': the size of what ConstantOfShape makes is read from tensor 'count', which is"
    with pytest.raises(NetworkError, match=message):
        check_network(content, SPECS)
    tiny.write_tiny_bundle(tmp_path / "b", **{"network.onnx": content})
    with pytest.raises(BundleError, match=f"tiny@1: {message}"):
        load_model(read_bundle(tmp_path / "b"), NumpyEngine, streams=1)


DATA = "is computed from a request's data"
UNBOUNDED = "has no bound that can be told: "
REFUSED_NETWORKS = {
    "magnitude": (counted_by(*MAGNITUDE), f"tensor 'count', which {DATA}"),
    "nonzero": (
        network(make("NonZero", "query", "places")),
        "operator NonZero is not allowed: the size of tensor 'places' would be counted in a request's data",
    ),
    "compress": (
        network(make("Greater", "surface zero", "kept"), make("Compress", "query kept", "few", axis=0), zero=0),
        "operator Compress is not allowed: the size of tensor 'few'",
    ),
    "range of data": (network(*MAGNITUDE[:2], make("Range", "zero total one", "r"), zero=0, one=1), DATA),
    "tile": (network(*MAGNITUDE[:2], make("Reshape", "total one", "n"), make("Tile", "n n", "t"), one=[1]), DATA),
    "expand": (network(*MAGNITUDE[:2], make("Reshape", "total one", "n"), make("Expand", "n n", "t"), one=[1]), DATA),
    "pad": (
        network(*MAGNITUDE[:2], make("Reshape", "total one", "n"), make("Concat", "n n", "p", axis=0),
                make("Pad", "n p", "t"), one=[1]),
        DATA,
    ),
    "onehot": (
        network(*MAGNITUDE[:2], make("OneHot", "surface total values", "t"), values=[0.0, 1.0]),
        DATA,
    ),
    "size hidden in a cast of a shape": (
        network(make("Shape", "query", "s"), make("Cast", "s", "c", to=TensorProto.INT8),
                make("ConstantOfShape", "c", "t")),
        "its inputs do not fit ConstantOfShape|whose largest value cannot be told",
    ),
    "more of a smaller batch": (
        network(make("Shape", "surface", "s"), make("Sub", "most s", "left"), make("ConstantOfShape", "left", "t"),
                most=[5_000]),
        "tensor 'left', whose largest value cannot be told",
    ),
    "squeezed": (network(make("Squeeze", "surface", "t")), f"{UNBOUNDED}it varies with the batch; state the axes"),
    "split": (
        network(make("Split", "query", "a b", num_outputs=2)),
        f"Split makes of tensor 'query' {UNBOUNDED}it changes an axis that varies with the batch",
    ),
    "sliced from both ends": (
        network(make("Slice", "query starts ends axes", "t"), starts=[-5], ends=[3], axes=[0]),
        f"Slice makes of tensor 'query' {UNBOUNDED}it changes an axis that varies with the batch",
    ),
    "sliced by the batch": (
        network(make("Shape", "surface", "s"), make("Slice", "query s ends axes", "t"), ends=[9_999], axes=[0]),
        "input 1 of Slice, tensor 's', varies with the batch, but must be a constant",
    ),
    "a constant beyond all": (network(make("Tile", "query n", "t"), n=[1, 1 << 40]), "1,099,511,627,776 is no size"),
    "rows times rows times rows": (
        network(make("Shape", "surface", "s"), make("Concat", "s s s", "c", axis=0), make("Mul", "c two", "d"),
                make("ConstantOfShape", "d", "t"), two=[2]),
        r"the largest tensor is 't' with the shape \[10000, 10000, 10000\]",
    ),
    "an outer product of the batch": (
        network(make("Unsqueeze", "surface ones", "a"), make("Mul", "a surface", "b"), make("Unsqueeze", "b two", "c"),
                make("Mul", "c surface", "d"), ones=[1], two=[2]),
        (r"node 'Mul': a run of 5,000 rows \(candidates_max\) of 5,000 requests holds 1,000,\d{3},\d{3},\d{3} bytes "
        r"here, the limit is 2,147,483,648 \(swap.run_bytes_max\); the largest tensor is 'd' with the shape "
        r"\[5000, 5000, 5000\]"),
    ),
    "a large one among many": (
        network(make("Expand", "one wide", "t"), one=[1.0], wide=[30_000, 30_000]),
        r"the largest tensor is 't' with the shape \[30000, 30000\]",
    ),
    "many that live at once": (
        network(
            *(make("Expand", "one wide", f"t{i}") for i in range(30)),
            make("Sum", " ".join(f"t{i}" for i in range(30)), "all"),
            one=[1.0], wide=[5_000, 5_000],
        ),
        "node 'Expand': a run of 5,000 rows",
    ),
    "a product that is summed away again": (
        network(make("Expand", "one wide", "t"), make("Einsum", "t t t", "u", equation="ab,bc,ca->a"),
                one=[1.0], wide=[2_000, 2_000]),
        (r"node 'Einsum': a run of 1 rows \(candidates_max\) of 1 requests holds 64,\d{3},\d{3},\d{3} bytes here, "
        r".* a product of some inputs of 'ab,bc,ca->a' is that large; split it"),
    ),
    "an equation that is none": (
        network(make("Einsum", "query query query", "t", equation="a.b,bc,cd->ad")),
        "node 'Einsum': b'a.b,bc,cd->ad' is no equation of an Einsum",
    ),
    "the steps of a recurrent layer that nobody reads": (
        network(make("Expand", "one wide", "x"),
                helper.make_node("LSTM", ["x", "weight", "again"], ["", "last"], hidden_size=100),
                one=[1.0], wide=[2_000, 3_000, 2], weight=np.ones((1, 400, 2)), again=np.ones((1, 400, 100))),
        (r"node 'LSTM': a run of .* rows .* holds 12,\d{3},\d{3},\d{3} bytes here, .* all gates of all steps are that "
        r"large"),
    ),
    "an input that nobody declares": (
        network(make("Neg", "query", "t")).replace(b"surface", b"tempest"),
        "the network takes an input 'tempest', which the manifest does not declare",
    ),
    "text": (network(make("Cast", "query", "t", to=TensorProto.STRING)), "tensor 't' does not hold numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_NETWORKS)
def test_sizes_without_a_bound_or_beyond_it_are_refused_by_name(name):
    content, message = REFUSED_NETWORKS[name]
    with pytest.raises(NetworkError, match=message):
        check_network(content, SPECS)


ALLOWED_NETWORKS = {
    "as large as the batch": network(
        make("Shape", "surface", "s"), make("Concat", "s four", "shape", axis=0), make("ConstantOfShape", "shape", "t"),
        four=[4],
    ),
    "expanded to the batch": network(
        make("Shape", "query", "s"), make("Expand", "one s", "t"), make("Tile", "t twice", "u"),
        one=[[1.0]], twice=[1, 2],
    ),
    "a range over the batch": network(
        make("Shape", "surface", "s"), make("Squeeze", "s", "n"), make("Range", "zero n one", "t"), zero=0, one=1
    ),
    "reshaped to the batch": network(
        make("Shape", "query", "s"), make("Gather", "s zero", "n"), make("Concat", "n two two", "shape", axis=0),
        make("Reshape", "query shape", "t", allowzero=1), zero=[0], two=[2],
    ),
    "the newest of a sequence": network(
        make("Slice", "sequence starts ends axes", "t"), starts=[-2], ends=[(1 << 63) - 1], axes=[1]
    ),
    "products of three": network(
        make("Einsum", "sequence query square", "t", equation="nld,nd,de->ne"), square=np.ones((4, 4))
    ),
    "parts": network(make("Split", "query sizes", "a b", axis=1), sizes=[1, 3]),
    "the best": network(make("TopK", "query two", "t u"), two=[2]),
    "a constant that others compute": network(
        make("Shape", "weights", "s"), make("Equal", "s four", "e"), make("Where", "e s four", "w"),
        make("ConstantOfShape", "w", "t"), four=[4, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED_NETWORKS)
def test_sizes_that_follow_from_constants_and_shapes_pass(name):
    check_network(ALLOWED_NETWORKS[name], SPECS)


def test_the_limit_counts_the_rows_that_a_server_accepts():
    nodes = make("Unsqueeze", "query two", "wide"), make("Expand", "wide shape", "t")
    content = network(*nodes, shape=[1, 1, 10_000], two=[2])
    check_network(content, SPECS, RunLimits(rows=5_000))
    with pytest.raises(NetworkError, match=r"a run of 50,000 rows .* the limit is 2,147,483,648"):
        check_network(content, SPECS, RunLimits(rows=50_000))
    check_network(content, SPECS, RunLimits(rows=50_000, bytes_max=16 << 30))


@pytest.mark.parametrize("name", ALLOWED_NETWORKS)
def test_no_run_makes_more_than_what_the_check_counts(name):
    """The limit at which the check passes is at least as many bytes as the largest tensor of a real run has."""
    model = onnx.load_model_from_string(ALLOWED_NETWORKS[name])
    made = [output for node in model.graph.node for output in node.output]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(output) for output in made)
    for rows in (1, 2, 7):
        batch = Assembler(tiny.manifest()).assemble(tiny.fetched(list(range(1, rows + 1)), [4, 5]), "home")
        given = {**batch.request, **batch.candidate}
        found = ReferenceEvaluator(model).run(None, {v.name: given[v.name] for v in model.graph.input})
        largest = max(np.asarray(tensor).nbytes for tensor in found)
        with pytest.raises(NetworkError, match="holds .* bytes here"):
            check_network(ALLOWED_NETWORKS[name], SPECS, RunLimits(rows, largest - 1))


OPERATORS = sorted(
    {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and onnx.defs.has(s.name, 18)}
    - operator_sizes.REFUSED
)
NUMBERS = st.sampled_from([-(1 << 63), -2, -1, 0, 1, 2, 3, 4, 7, 1_000, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1])

CHANGES = ["operator", "input", "fewer", "more", "number", "attribute", "insert", "shape", "bytes"]
ATTRIBUTES = ["axis", "keepdims", "to", "allowzero", "axes", "num_outputs", "perm", "split"]


def mutated(model, draw):
    """Change a valid network at one place, as somebody would who looks for a hole."""
    nodes, tensors = model.graph.node, model.graph.initializer
    names = [*(t.name for t in tensors), *(v.name for v in model.graph.input), *(o for n in nodes for o in n.output)]
    node = draw(st.sampled_from(list(nodes)))
    match draw(
        st.sampled_from(["operator", "input", "fewer", "more", "number", "attribute", "insert", "shape", "bytes"])
    ):
        case "operator":
            node.op_type = draw(st.sampled_from(OPERATORS))
        case "input" if node.input:
            node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
        case "fewer" if node.input:
            node.input.pop()
        case "more":
            node.input.append(draw(st.sampled_from([*names, ""])))
        case "number":
            tensor = draw(st.sampled_from(list(tensors)))
            array = numpy_helper.to_array(tensor).copy()
            if array.size:
                numbers = draw(st.lists(NUMBERS, min_size=array.size, max_size=array.size))
                array = np.array(numbers, np.int64).astype(array.dtype).reshape(array.shape)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        case "attribute":
            given = draw(
                st.sampled_from(["axis", "keepdims", "to", "allowzero", "axes", "num_outputs", "perm", "split"])
            )
            number = draw(NUMBERS)
            several = given in {"axes", "perm", "split"}
            node.attribute.append(helper.make_attribute(given, [number] * 2 if several else number))
        case "insert":
            place, schema = draw(st.integers(0, len(nodes))), onnx.defs.get_schema(draw(st.sampled_from(OPERATORS)), 18)
            there = names[: len(names) - sum(len(n.output) for n in nodes[place:])]
            count = draw(st.integers(schema.min_input, min(schema.max_input, schema.min_input + 2)))
            read = draw(st.lists(st.sampled_from(there), min_size=count, max_size=count))
            made = [f"inserted{len(nodes)}_{i}" for i in range(max(1, schema.min_output))]
            nodes.insert(place, helper.make_node(schema.name, read, made))
        case "shape":
            tensor = draw(st.sampled_from(list(tensors)))
            tensor.dims.append(draw(NUMBERS))
        case "bytes":
            content = bytearray(model.SerializeToString())
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
            return bytes(content)
    return model.SerializeToString()


FUZZED = RunLimits(rows=3, bytes_max=1 << 20)


def tensors_of_runs(content):
    """Yield every tensor of a few runs, as far as the runs do not fail."""
    model = onnx.load_model_from_string(content)
    made = [output for node in model.graph.node for output in node.output if output]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(output) for output in made)
    assembler = Assembler(tiny.manifest())
    for requests in ([[1]], [[1, 2, 3]], [[1], [2], [3]], [[1], [2, 3]]):
        batch = FeatureBatch.concat([assembler.assemble(tiny.fetched(pins, [4, 5]), "home") for pins in requests])
        given = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
        feeds = {value.name: given[value.name] for value in model.graph.input}
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from ReferenceEvaluator(model).run(None, feeds)
        except Exception:
            continue


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_network_is_refused_by_name_or_stays_within_the_limit(data):
    bases = [tiny.network(), *ALLOWED_NETWORKS.values()]
    content = data.draw(st.sampled_from(bases))
    for _ in range(data.draw(st.integers(1, 3))):
        try:
            content = mutated(onnx.load_model_from_string(content), data.draw)
        except (DecodeError, KeyError, TypeError, ValueError):  # nothing left to change
            break
    try:
        check_network(content, SPECS, FUZZED)
    except NetworkError:
        return
    for tensor in tensors_of_runs(content):
        assert np.asarray(tensor).nbytes <= FUZZED.bytes_max
