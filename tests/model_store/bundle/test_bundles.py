from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import BundleError, read_bundle
from model_store.bundle.golden import decode_golden, encode_golden
from model_store.bundle.manifest import Calibration, Head, Manifest
from model_store.bundle.tensor_sources import EmbeddingVector, Scalars, SequenceActions, TensorInput
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate, load_model
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit_manifest(folder, change):
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))


def test_good_bundle_loads_and_scores_its_golden_requests(folder):
    model = load_model(read_bundle(folder), NumpyEngine, streams=1)
    assert model.manifest.ref == "tiny@1"
    assert model.engine.cost_s(128) > 0


def test_a_model_knows_how_long_vectors_of_its_querys_space_are(tmp_path):
    def norm_max(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tiny.write_tiny_bundle(folder, **changes)
        return load_model(read_bundle(folder), NumpyEngine, streams=1, warm=False).query_norm_max

    golden = tiny.golden(tiny.network(seed=1), tiny.manifest_fields())
    norms = [np.linalg.norm(g.fetched.pins["pin_core"].rows["embedding"].astype(float), axis=1) for g in golden]
    norms += [np.linalg.norm(g.fetched.user["user_core"].rows["embedding"].astype(float), axis=1) for g in golden]
    assert norm_max() == pytest.approx(100 * max(n.max() for n in norms))
    for one in golden:
        for rows in (*one.fetched.pins.values(), *one.fetched.user.values()):
            rows.rows["embedding"] = 0
    engine = NumpyEngine(tiny.network(seed=1), tiny.manifest().specs, 2)
    unknown = [
        replace(
            g,
            probabilities=calibrate(
                tiny.manifest(), engine.run(Assembler(tiny.manifest()).assemble(g.fetched, g.surface))
            ),
        )
        for g in golden
    ]
    assert norm_max(**{"golden.npz": encode_golden(unknown)}) == 100  # as if it knew unit vectors


def test_loading_beside_requests_rests_after_compiling_and_after_the_golden_ones(folder):
    steps = []

    class Told(NumpyEngine):
        def __init__(self, *arguments, **options):
            steps.append("compiled")
            super().__init__(*arguments, **options)

        def run(self, batch):
            steps.append("run")
            return super().run(batch)

    load_model(read_bundle(folder), Told, streams=1, warm=False, pause=lambda: steps.append("pause"))
    assert steps == ["compiled", "pause", "run", "pause"]


def test_the_same_content_gives_the_same_digest(tmp_path):
    for name in ("a", "b"):
        tiny.write_tiny_bundle(tmp_path / name)
    assert read_bundle(tmp_path / "a").digest == read_bundle(tmp_path / "b").digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "network.onnx").unlink(), "network.onnx: No such file"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: manifest: Invalid JSON"),
        (lambda f: (f / "golden.npz").write_bytes(b"x"), r"golden.npz has 1 bytes, the manifest says"),
        (lambda f: edit_manifest(f, lambda m: m.pop("heads")), "heads: Field required"),
        (lambda f: edit_manifest(f, lambda m: m.update(colour=1)), "colour: Extra inputs"),
        (lambda f: edit_manifest(f, lambda m: m["files"].pop("utility.toml")), "does not list utility.toml"),
        (lambda f: edit_manifest(f, lambda m: m["files"].update({"../x.bin": m["files"]["golden.npz"]})), "files"),
        (lambda f: edit_manifest(f, lambda m: m.update(schema_version=2)), "schema_version"),
    ],
)
def test_damaged_bundle_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)


def test_a_flipped_bit_is_found(folder):
    content = bytearray((folder / "network.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "network.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"network.onnx: the digest differs from the manifest's"):
        read_bundle(folder)


def test_a_network_that_computes_something_else_is_refused_with_row_and_head(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "b", **{"network.onnx": tiny.network(seed=99)})
    with pytest.raises(BundleError, match=r"tiny@1: golden row \d, head '(save|hide)': expected probability"):
        load_model(read_bundle(tmp_path / "b"), NumpyEngine, streams=1)


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04cut off", b"\x93NUMPY\x01\x00", encode_golden([])])
def test_a_bundle_without_golden_requests_is_refused(tmp_path, content):
    tiny.write_tiny_bundle(tmp_path / "b", **{"golden.npz": content})
    with pytest.raises(BundleError, match="golden"):
        load_model(read_bundle(tmp_path / "b"), NumpyEngine, streams=1)


def test_golden_requests_survive_encoding(tmp_path):
    requests = tiny.golden(tiny.network(), tiny.manifest_fields())
    decoded = decode_golden(encode_golden(requests))
    assembler = Assembler(tiny.manifest())
    for one, other in zip(requests, decoded, strict=True):
        assert one.surface == other.surface
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
        first, second = (assembler.assemble(g.fetched, g.surface) for g in (one, other))
        for name, tensor in {**first.request, **first.candidate}.items():
            np.testing.assert_array_equal(tensor, {**second.request, **second.candidate}[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": (TensorInput(name="x", source=Scalars(group="gone", fields=("a",))),)}, "no feature group 'gone'"),
        ({"inputs": (TensorInput(name="x", source=Scalars(group="pin_core", fields=("topic",))),)}, "are not scalars"),
        (
            {"inputs": (TensorInput(name="x", source=EmbeddingVector(group="pin_core", field="topic")),)},
            "is not an embedding",
        ),
        ({"inputs": (*tiny.INPUTS, tiny.INPUTS[0])}, "input names must be unique"),
        ({"sequence": None, "inputs": (TensorInput(name="x", source=SequenceActions()),)}, "declares no sequence"),
        ({"heads": (Head(name="save", meaning=""),) * 2}, "head names must be unique"),
        ({"inputs": tiny.INPUTS[:-1]}, "a surface needs a query, but no input reads one"),
    ],
)
def test_incoherent_manifest_is_refused_by_name(changes, message):
    with pytest.raises(ValidationError) as raised:
        Manifest(**tiny.manifest_fields() | changes, files={})
    assert message in str(raised.value)


def test_manifest_survives_json():
    manifest = tiny.manifest()
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest
    assert [g.fingerprint for g in again.groups] == [g.fingerprint for g in manifest.groups]


def test_calibration_is_logistic_per_head_and_safe_at_the_ends():
    logits = np.array([[0.0, 1.0], [1e30, -1e30], [np.nan, np.inf]], np.float32)
    manifest = tiny.manifest()
    assert manifest.heads[0].calibration == Calibration(slope=0.5, intercept=-0.1)
    found = calibrate(manifest, logits)
    np.testing.assert_allclose(found[0], [1 / (1 + np.exp(0.1)), 1 / (1 + np.exp(-1))], rtol=1e-6)
    np.testing.assert_allclose(found[1], [1.0, 0.0], atol=1e-30)
    assert np.isnan(found[2]).all()


def test_assembly_pads_sequences_newest_first_and_scales_int8_spaces():
    assembled = Assembler(tiny.manifest()).assemble(tiny.fetched([1, 2], [4, 5]), "related")
    sequence = assembled.request["sequence"]
    expected = tiny.pin_rows(np.array([4, 5]))["embedding"]
    np.testing.assert_array_equal(sequence[0, :2], expected)
    assert not sequence[0, 2].any()
    assert assembled.request["actions"].tolist() == [[1, 1, 0]]
    assert assembled.request["surface"].tolist() == [1]
    assert not assembled.request["query"].any()
    for spec in tiny.manifest().specs:
        side = assembled.request if spec.side == "request" else assembled.candidate
        assert side[spec.name].shape[1:] == spec.shape
        assert side[spec.name].dtype == spec.dtype
