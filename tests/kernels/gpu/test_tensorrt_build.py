"""The real parser and builder of TensorRT for RTX, ahead of time: they need no GPU."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from kernels.engine import LOGITS, ROW_REQUEST, EngineError
from kernels.gpu.staging import Buckets, Layout
from kernels.gpu.tensorrt_build import (
    Settings,
    build,
    build_here,
    load_library,
    parsed,
    plan_name,
    prepared,
    profile_of,
)
from tests import tiny
from tests.kernels.test_engines import SPECS
from tests.ranker.exported import FORMS, exported

ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0")
RTX = Settings("tensorrt_rtx", architectures=ARCHITECTURES)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("fusion", "form"), FORMS)
def test_every_exported_ranker_builds_for_every_architecture(fusion, form, half):
    network, specs = exported(fusion, form)
    settings = Settings("tensorrt_rtx", half, architectures=ARCHITECTURES)
    assert len(build_here(network, specs, settings).plan) > len(network) // 4


@pytest.mark.parametrize(("fusion", "form"), FORMS)
def test_the_parsed_network_has_the_manifests_inputs_and_types(fusion, form):
    network, specs = exported(fusion, form)
    trt = load_library("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    maker, content = trt.Builder(logger), prepared(trt, network, specs, Settings("tensorrt_rtx"))
    definition, _parser = parsed(trt, maker, content, logger)
    inputs = [definition.get_input(i) for i in range(definition.num_inputs)]
    expected = {spec.name: (np.dtype(spec.dtype), (-1, *spec.shape)) for spec in specs}
    found = {value.name: (np.dtype(trt.nptype(value.dtype)), tuple(value.shape)) for value in inputs}
    assert found == expected | {ROW_REQUEST: (np.dtype(np.int64), (-1,))}
    (output,) = [definition.get_output(i) for i in range(definition.num_outputs)]
    assert (output.name, np.dtype(trt.nptype(output.dtype))) == (LOGITS, np.float32)
    kinds = {str(definition.get_layer(i).get_output(0).dtype) for i in range(definition.num_layers)}
    assert "DataType.BF16" in kinds


def test_a_plan_takes_every_bucket_of_shapes():
    network, specs = exported()
    trt = load_library("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    maker, content = trt.Builder(logger), prepared(trt, network, specs, RTX)
    definition, _parser = parsed(trt, maker, content, logger)
    profile = profile_of(maker, definition, specs)
    for bucket in Buckets().all():
        for name, place in Layout(specs, bucket).places.items():
            least, _, most = profile.get_shape(name)
            sizes = list(zip(least, place.shape, most, strict=True))
            assert all(low <= size <= high for low, size, high in sizes), (name, bucket, sizes)


def test_a_plan_is_built_in_a_process_of_its_own():
    built = build(tiny.network(), SPECS, RTX)
    assert len(built.plan) > 1000


def test_a_network_that_is_none_is_refused_in_the_parsers_words():
    with pytest.raises(EngineError, match="exit status 1.*the network cannot be loaded"):
        build(b"no onnx", SPECS, RTX)


def test_an_architecture_that_is_not_known_names_those_that_are():
    with pytest.raises(EngineError, match="cannot build for 9.9; use one of .*SM89"):
        build(tiny.network(), SPECS, Settings("tensorrt_rtx", architectures=("9.9",)))


def test_a_builder_that_is_killed_is_an_error_here_and_no_more(monkeypatch, tmp_path):
    """What a crash in the library comes to."""
    crash = tmp_path / "sitecustomize.py"
    crash.write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(EngineError, match="could not build the network .signal 11"):
        build(tiny.network(), SPECS, RTX)


def test_a_plans_name_says_what_it_runs_on():
    name = plan_name("tensorrt", "10.13.3.9", "sm_90", "bfloat16")
    assert name == "plans/tensorrt_10_13_3_9-sm_90-bfloat16.plan"
