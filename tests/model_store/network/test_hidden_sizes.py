"""No batch takes more memory than the three that the check looks at, however a network hides a size between them."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from kernels.engine import TensorSpec
from model_store.network.batches import Batches
from model_store.network.check import NetworkError, RunLimits, check_network

SPECS = [TensorSpec("pin", "candidate", "float32", (2,)), TensorSpec("user", "request", "float32", (2,))]
LIMIT = 650_000


def network(*nodes, functions=(), **constants):
    """A network that has the numbers of rows and of requests in `n` and `r`, int64[1], and more nodes."""
    first = [make("Shape", "pin", "n", start=0, end=1), make("Shape", "user", "r", start=0, end=1)]
    last = [make("Neg", "pin", "logits")]
    tensors = [numpy_helper.from_array(np.array(values), name) for name, values in constants.items()]
    values = [("pin", ["N", 2]), ("user", ["R", 2]), ("logits", ["N", 2])]
    pin, user, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values)
    graph = helper.make_graph([*first, *nodes, *last], "sizes", [pin, user], [logits], tensors)
    imported = [helper.make_opsetid("", 18), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    model = helper.make_model(graph, opset_imports=imported, functions=functions, ir_version=10)
    return model.SerializeToString()


def make(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


class Runs:
    """Runs of a network, node by node, so that a run that fails counts as far as it comes."""

    def __init__(self, content):
        model = inline_local_functions(onnx.load_model_from_string(content))
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.nodes = [ReferenceEvaluator(node) for node in model.graph.node]

    def largest(self, rows, requests):
        """Return the bytes of the largest tensor of a batch."""
        made = {**self.constants, "pin": np.zeros((rows, 2), np.float32), "user": np.zeros((requests, 2), np.float32)}
        largest = 0
        for node in self.nodes:
            try:
                with np.errstate(all="ignore"):
                    outputs = node.run(None, {name: made[name] for name in node.input_names})
            except Exception:  # such as a Reshape whose sizes do not divide the elements
                break
            made |= zip(node.output_names, (np.asarray(output) for output in outputs), strict=True)
            largest = max(largest, *(np.asarray(output).nbytes for output in outputs))
        return largest


ZEROS = make("ConstantOfShape", "count", "zeros")
MINUS_77 = make("Sub", "n middle", "away"), make("Mul", "away away", "squared")
LEFT = helper.make_function("own", "Left", ["x", "y"], ["z"], [make("Sub", "y x", "z")], [helper.make_opsetid("", 18)])
TABLE = np.where(np.arange(101) == 77, 1_000_000, 1)

#: A network, the rows and requests at which it would take more than the limit, and the most rows.
HIDDEN = {
    "N (100 - N)": (
        network(make("Sub", "most n", "left"), make("Mul", "n left", "area"),
                make("Concat", "area wide", "count", axis=0), ZEROS, most=[100], wide=[100]),
        (50, 1), 100,
    ),
    "N (100 - N) by Neg": (
        network(make("Neg", "n", "less"), make("Add", "most less", "left"),
                make("Concat", "n left wide", "count", axis=0), ZEROS, most=[100], wide=[100]),
        (50, 1), 100,
    ),
    "N (100 - N) by a negative constant": (
        network(make("Mul", "n minus", "less"), make("Add", "most less", "left"),
                make("Concat", "n left wide", "count", axis=0), ZEROS, minus=[-1], most=[100], wide=[100]),
        (50, 1), 100,
    ),
    "N (100 - N) in a function": (
        network(helper.make_node("Left", ["n", "most"], ["left"], domain="own"),
                make("Concat", "n left wide", "count", axis=0), ZEROS, most=[100], wide=[100], functions=[LEFT]),
        (50, 1), 100,
    ),
    "2500 - (N - 50)^2": (
        network(make("Add", "n minus", "away"), make("Mul", "away away", "squared"),
                make("Sub", "most squared", "area"), make("Concat", "area wide", "count", axis=0), ZEROS,
                minus=[-50], most=[2_500], wide=[100]),
        (50, 1), 100,
    ),
    "R (N - R)": (
        network(make("Sub", "n r", "left"), make("Concat", "r left wide", "count", axis=0), ZEROS, wide=[100]),
        (100, 50), 100,
    ),
    "1 / (1 + (N - 77)^2)": (
        network(*MINUS_77, make("Add", "squared one", "parts"), make("Div", "most parts", "count"), ZEROS,
                middle=[77], one=[1], most=[1_000_000]),
        (77, 1), 100,
    ),
    "N is 77": (
        network(make("Equal", "n middle", "is"), make("Cast", "is", "one", to=TensorProto.INT64),
                make("Mul", "one most", "count"), ZEROS, middle=[77], most=[1_000_000]),
        (77, 5), 100,
    ),
    "where N is 77": (
        network(make("Equal", "n middle", "is"), make("Where", "is most n", "count"), ZEROS,
                middle=[77], most=[1_000_000]),
        (77, 77), 100,
    ),
    "where N is 2 R": (
        network(make("Add", "r r", "twice"), make("Equal", "n twice", "is"), make("Where", "is most n", "count"),
                ZEROS, most=[1_000_000]),
        (50, 25), 100,
    ),
    "N mod 97": (
        network(make("Mod", "n prime", "rest"), make("Concat", "rest rest wide", "count", axis=0), ZEROS,
                prime=[97], wide=[20]),
        (96, 1), 100,
    ),
    "a byte that wraps around": (
        network(make("Mul", "n three", "more"), make("Cast", "more", "byte", to=TensorProto.UINT8),
                make("Cast", "byte", "rest", to=TensorProto.INT64), make("Concat", "rest rest three", "count", axis=0),
                ZEROS, three=[3]),
        (85, 1), 100,
    ),
    "bits": (
        network(make("BitwiseAnd", "n bit", "rest"), make("Concat", "rest rest wide", "count", axis=0), ZEROS,
                bit=[24], wide=[300]),
        (24, 1), 32,
    ),
    "a table": (network(make("Gather", "table n", "count"), ZEROS, table=TABLE), (77, 1), 100),
    "a bell of floats": (
        network(make("Cast", "n", "real", to=TensorProto.FLOAT), make("Sub", "real middle", "away"),
                make("Mul", "away away", "squared"), make("Neg", "squared", "below"), make("Exp", "below", "bell"),
                make("Mul", "bell most", "size"), make("Cast", "size", "count", to=TensorProto.INT64), ZEROS,
                middle=np.array([77.0], np.float32), most=np.array([1e6], np.float32)),
        (77, 1), 100,
    ),
    "a range from N": (
        network(make("Squeeze", "n", "from"), make("Range", "from most one", "range"),
                make("Unsqueeze", "range axis", "b"), make("ReduceSum", "pin axis", "a", keepdims=0),
                make("Cast", "a", "c", to=TensorProto.INT64), make("Mul", "b c", "area"), most=600, one=1, axis=[1]),
        (300, 1), 599,
    ),
    "a slice from N": (
        network(make("Slice", "row n ends", "rest"), make("Unsqueeze", "rest axis", "b"),
                make("ReduceSum", "pin axis", "a", keepdims=0), make("Mul", "b a", "area"),
                row=np.zeros(900, np.float32), ends=[900], axis=[1]),
        (450, 1), 899,
    ),
    "a convolution by N": (
        network(make("Slice", "pin start one axis", "column"), make("Transpose", "column", "flat"),
                make("Unsqueeze", "flat start", "kernel"), make("Conv", "row kernel", "rest"),
                make("Transpose", "rest", "b"), make("ReduceSum", "pin axis", "a", keepdims=0),
                make("Mul", "b a", "area"), row=np.zeros((1, 1, 900), np.float32), start=[0], one=[1], axis=[1]),
        (450, 1), 899,
    ),
    "rows beyond 40, divided by rows beyond 50": (
        network(make("Slice", "pin at40 end axis", "a"), make("Slice", "pin at50 end axis", "b"),
                make("Shape", "a", "c", start=0, end=1), make("Add", "c one", "rows"),
                make("Shape", "b", "d", start=0, end=1), make("Add", "d one", "parts"),
                make("Concat", "parts parts minus", "shape", axis=0), make("Reshape", "big shape", "divided"),
                make("Shape", "divided", "rest", start=2, end=3), make("Concat", "rest rows rows", "count", axis=0),
                ZEROS, at40=[40], at50=[50], end=[1 << 40], axis=[0], one=[1], minus=[-1],
                big=np.zeros(2_601, np.int8)),
        (50, 1), 100,
    ),
    "N^2 / (N + 8)^4": (
        network(make("Add", "n eight", "parts"), make("Concat", "parts parts minus", "shape", axis=0),
                make("Reshape", "big shape", "divided"), make("Shape", "divided", "rest", start=2, end=3),
                make("Concat", "rest rest n n", "count", axis=0), ZEROS,
                eight=[8], minus=[-1], big=np.zeros(20_736, np.int8)),
        (8, 1), 64,
    ),
    "1 / (N + 64 / N)^3": (
        network(make("Concat", "n minus", "shape", axis=0), make("Reshape", "row shape", "divided"),
                make("Shape", "divided", "rest", start=1, end=2), make("Add", "n rest", "parts"),
                make("Concat", "parts minus", "shape2", axis=0), make("Reshape", "big shape2", "divided2"),
                make("Shape", "divided2", "rest2", start=1, end=2),
                make("Concat", "rest2 rest2 rest2", "count", axis=0), ZEROS,
                minus=[-1], row=np.zeros(64, np.int8), big=np.zeros(1_040, np.int8)),
        (8, 1), 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_a_size_that_is_largest_between_the_batches_that_are_looked_at_is_refused(name):
    content, (rows, requests), most = HIDDEN[name]
    runs = Runs(content)
    assert runs.largest(rows, requests) > LIMIT
    for corner in ((1, 1), (most, 1), (most, most)):
        assert runs.largest(*corner) < LIMIT
    with pytest.raises(NetworkError, match="cannot be told|can be told|is not allowed|must be a constant"):
        check_network(content, SPECS, RunLimits(most, LIMIT))


def test_a_size_that_wraps_around_in_int32_is_refused():
    """It would be 2^32 at 4,096 rows, which wraps around to 0, and almost 2^31 at 2,047."""
    nodes = make("Concat", "n wide", "count", axis=0), ZEROS, make("Size", "zeros", "size")
    narrow = make("Cast", "size", "narrow", to=TensorProto.INT32), make("Cast", "narrow", "again", to=TensorProto.INT64)
    last = make("Unsqueeze", "again axis", "count2"), make("ConstantOfShape", "count2", "zeros2")
    content = network(*nodes, *narrow, *last, wide=[1 << 20], axis=[0])
    with pytest.raises(NetworkError, match="tensor 'count2', whose largest value cannot be told"):
        check_network(content, SPECS, RunLimits(4_096, 1 << 50))
    check_network(content, SPECS, RunLimits(2_047, 1 << 50))


ROWS = 12
PAIRS = [(rows, requests) for requests, rows in combinations_with_replacement(range(1, ROWS + 1), 2)]
OPERATORS = [
    "Add",
    "Mul",
    "Max",
    "Min",
    "Sub",
    "Div",
    "Mod",
    "Sum",
    "Neg",
    "Equal",
    "Where",
    "Gather",
    "Reshape",
    "Concat",
]
CONSTANTS = {"minus": [-1], "one": [1], "two": [2], "five": [5], "twelve": [12], "many": [720]}


def random_network(draw):
    """Sizes of sizes: operators on the numbers of rows and requests, and tensors that are divided by them."""
    sizes, nodes = ["n", "r", *CONSTANTS], []
    for place in range(draw(st.integers(1, 5))):
        picked = [draw(st.sampled_from(sizes)) for _ in range(3)]
        operator, size = draw(st.sampled_from(OPERATORS)), f"size{place}"
        match operator:
            case "Neg":
                nodes.append(make("Neg", picked[0], size))
            case "Where":
                nodes += [
                    make("Equal", f"{picked[0]} {picked[1]}", f"is{place}"),
                    make("Where", f"is{place} {picked[2]} {picked[0]}", size),
                ]
            case "Equal":
                nodes += [
                    make("Equal", f"{picked[0]} {picked[1]}", f"is{place}"),
                    make("Cast", f"is{place}", size, to=TensorProto.INT64),
                ]
            case "Gather":
                nodes.append(make("Gather", f"table {picked[0]}", size))
            case "Concat":  # as many rows as two sizes together
                nodes += [
                    *(make("ConstantOfShape", name, f"zeros{place}{i}") for i, name in enumerate(picked[:2])),
                    make("Concat", f"zeros{place}0 zeros{place}1", f"both{place}", axis=0),
                    make("Shape", f"both{place}", size),
                ]
            case "Reshape":
                nodes += [
                    make("Concat", " ".join(picked), f"c{place}", axis=0),
                    make("ConstantOfShape", f"c{place}", f"m{place}"),
                    make("Concat", f"{draw(st.sampled_from(sizes))} minus", f"s{place}", axis=0),
                    make("Reshape", f"m{place} s{place}", f"d{place}"),
                    make("Shape", f"d{place}", size, start=1, end=2),
                ]
            case _:
                nodes.append(make(operator, f"{picked[0]} {picked[1]}", size))
        sizes.append(size)
    nodes += [make("Concat", f"{sizes[-1]} {draw(st.sampled_from(sizes))}", "count", axis=0), ZEROS]
    return network(*nodes, table=np.arange(13)[::-1].copy(), **CONSTANTS)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_batch_of_an_accepted_network_has_a_larger_tensor_than_the_check_counts(data):
    content = random_network(data.draw)
    try:
        check_network(content, SPECS, RunLimits(ROWS, 1 << 20))
    except NetworkError:
        return
    runs = Runs(content)
    largest = max(runs.largest(*pair) for pair in PAIRS)
    with pytest.raises(NetworkError, match="holds .* bytes here"):
        check_network(content, SPECS, RunLimits(ROWS, largest - 1))


TERMS = st.lists(st.tuples(st.integers(1, 9), st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=4)


@given(TERMS, st.integers(4, 60))
def test_sums_of_products_are_largest_at_a_corner(terms, most):
    def size(rows, requests):
        return math.fsum(c * rows**a * requests**b for c, a, b in terms)

    *corners, inside = Batches.up_to(most).pairs
    bound = max(size(*pair) for pair in corners)
    assert 1 < inside[1] < inside[0] < most
    for rows in range(1, most + 1):
        assert all(size(rows, requests) <= bound * (1 + 1e-12) for requests in range(1, rows + 1))


@given(TERMS, st.integers(4, 5_000))
def test_a_sum_is_one_product_if_its_terms_have_the_same_powers(terms, most):
    batches = Batches.up_to(most)
    # Whole numbers as sizes are: without negative powers.
    terms = [(c, a + 3, b + 3) for c, a, b in terms]
    sizes = [sum(c * rows**a * requests**b for c, a, b in terms) for rows, requests in batches.pairs]
    assert batches.is_product(sizes) == (len({(a, b) for _, a, b in terms}) == 1)
