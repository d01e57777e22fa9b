"""What PyTorch's two exporters make of ordinary rankers passes the check of networks, and computes the same."""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bench.rankers.dcn_v2 import DcnV2
from bench.rankers.inputs import Shape
from bench.rankers.sasrec import SasRec
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import LOGITS, ROW_REQUEST, FeatureBatch, TensorSpec
from model_store.network.check import NetworkError, check_network
from tests.ranker.export.foreign_rankers import DIM, HEADS, LENGTH, RANKERS, Ranker

SHAPE = Shape(HEADS, DIM, user_scalars=4, pin_scalars=4, surfaces=2, actions=4, length=LENGTH, pins=50)
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


class OfBench(nn.Module):
    """A published ranker of `bench`, which reads a mapping."""

    def __init__(self, ranker, names):
        super().__init__()
        self.ranker, self.names = ranker, names

    def forward(self, *tensors):
        return self.ranker(dict(zip(self.names, tensors, strict=True)))


def batch(*splits):
    """A batch of requests with so many rows each."""
    rng, requests, rows = np.random.default_rng(3), len(splits), sum(splits)
    actions = rng.integers(1, 5, (requests, LENGTH))
    actions[:, LENGTH // 2 :] *= rng.integers(0, 2, (requests, 1))
    request = {
        "sequence": rng.normal(size=(requests, LENGTH, DIM)).astype(np.float32),
        "actions": actions,
        "user": rng.normal(size=(requests, DIM)).astype(np.float32),
    }
    candidate = {"pin": rng.normal(size=(rows, DIM)).astype(np.float32)}
    return FeatureBatch(request, candidate, np.cumsum([0, *splits]).astype(np.int32))


def batch_of_bench(*splits):
    taken, rng = batch(*splits), np.random.default_rng(4)
    requests, rows = len(splits), sum(splits)
    request = {
        "user_embedding": taken.request["user"],
        "user_scalars": rng.normal(size=(requests, 4)).astype(np.float32),
        "surface": rng.integers(0, 2, requests),
        "query": taken.request["user"],
        "sequence_actions": taken.request["actions"],
        "sequence_embeddings": taken.request["sequence"],
        "sequence_numbers": rng.integers(0, 51, (requests, LENGTH)),
    }
    candidate = {
        "pin_embedding": taken.candidate["pin"],
        "pin_scalars": rng.normal(size=(rows, 4)).astype(np.float32),
        "pin_number": rng.integers(0, 51, rows),
    }
    return FeatureBatch(request, candidate, taken.row_splits)


def tensors(taken):
    return {
        name: torch.from_numpy(array)
        for name, array in {**taken.request, **taken.candidate, ROW_REQUEST: taken.row_request()}.items()
    }


def specs_of(taken):
    sides = ("request", taken.request), ("candidate", taken.candidate)
    return [TensorSpec(name, side, a.dtype.name, a.shape[1:]) for side, arrays in sides for name, a in arrays.items()]


def exported(module, taken, dynamo):
    """The network of a module that reads the tensors of a batch in their order, with both leading axes dynamic."""
    given = tensors(taken)
    names, leading = list(given), ["R" if name in taken.request else "N" for name in given]
    kept = io.BytesIO()
    with warnings.catch_warnings():  # about the exporters' own future, and operators that they fold
        warnings.simplefilter("ignore")
        if dynamo:
            dims = {name: torch.export.Dim(name) for name in ("R", "N")}
            shapes = tuple({0: dims[name]} for name in leading)
            shapes = (shapes,) if isinstance(module, OfBench) else shapes  # of *tensors
            program = torch.onnx.export(
                module, tuple(given.values()), dynamo=True, input_names=names, output_names=[LOGITS],
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
            return program.model_proto.SerializeToString()
        axes = {name: {0: dim} for name, dim in zip(names, leading, strict=True)}
        torch.onnx.export(
            module, tuple(given.values()), kept, dynamo=False, input_names=names, output_names=[LOGITS],
            dynamic_axes=axes,
        )  # fmt: skip
        return kept.getvalue()


@pytest.fixture(autouse=True)
def _quiet_exporter(caplog):
    caplog.set_level(logging.ERROR, logger="torch.onnx")


def assert_taken_and_the_same(module, make, dynamo):
    content, specs = exported(module, make(3, 2, 4), dynamo), specs_of(make(1))
    check_network(content, specs)
    engine = NumpyEngine(content, specs, HEADS)
    for taken in (make(2), make(5, 1), make(1, 3, 1, 2)):
        with torch.inference_mode():
            expected = module(*tensors(taken).values()).numpy()
        np.testing.assert_allclose(engine.run(taken), expected, atol=1e-4)


@EXPORTERS
@pytest.mark.parametrize("name", RANKERS)
def test_a_ranker_in_plain_pytorch_is_taken_and_computes_the_same(name, dynamo):
    torch.manual_seed(1)
    assert_taken_and_the_same(Ranker(RANKERS[name]).eval(), batch, dynamo)


@EXPORTERS
@pytest.mark.parametrize("ranker", [DcnV2, SasRec])  # no exporter takes this DIN's loop over requests
def test_published_rankers_are_taken_and_compute_the_same(ranker, dynamo):
    torch.manual_seed(1)
    module = OfBench(ranker(SHAPE), list(tensors(batch_of_bench(1)))).eval()
    assert_taken_and_the_same(module, batch_of_bench, dynamo)


def test_a_mask_that_selects_is_refused_by_name():
    """The result is as large as the data says."""

    def chosen(m, sequence, actions, user, pin, row):
        return m.narrow(sequence[actions > 0].mean(0) + user[row] + pin)

    with pytest.raises(NetworkError, match="operator (NonZero|Compress) is not allowed"):
        check_network(exported(Ranker(chosen).eval(), batch(3, 2, 4), dynamo=False), specs_of(batch(1)))
