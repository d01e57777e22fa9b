from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import EXPLORATION, copy_out, read_bundle
from model_store.exploration.table import read_exploration
from model_store.model.loaded import load_model
from model_store.model.utility import load_utility
from model_store.registry.store import open_model_store
from ranker.cli.train.options import BundleOptions
from tests import tiny
from tests.conftest import needs_training
from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic

UTILITY = """
[surfaces.home]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
[surfaces.related]
weights = { pinner = 1.0 }
utilities = { pinner = "save" }
"""
EXPLORE = """
seed = 7
[surfaces.home]
kind = "order"
share = 0.0125
regret_max = 0.05
best = 4
temperature = 0.1
floor = 0.05
"""


@pytest.fixture
def explore(tmp_path: Path) -> Path:
    path = tmp_path / "explore.toml"
    path.write_text(EXPLORE)
    return path


@pytest.fixture
def utility(tmp_path: Path) -> Path:
    path = tmp_path / "utility.toml"
    path.write_text(UTILITY)
    return path


@needs_training
def test_train_publishes_and_labels_and_evaluate_compares(
    tmp_path: Path, utility: Path, explore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, store = write_atomic(tmp_path / "data", per_user=20), tmp_path / "models"
    tried = (
        "train", "--data", data, "--name", "toy", "--utility", utility, "--store", store, "--epochs", "1",
        "--variant", "base", "--size", "hidden=16", "--size", "pieces=0", "--requests-max", "40",
        "--baseline-requests-max", "10",
    )  # fmt: skip
    code, output = run(*tried)
    assert code == 1
    assert "toy@1 was not published, because it is not at least as good as its baselines" in output
    assert ": HIT@3 by head " in output
    assert open_model_store(str(store)).models() == []
    (kept,) = tmp_path.glob("toy-1-*")
    refused = read_bundle(kept).manifest.lineage
    assert refused.shortfalls
    code, output = run(
        "train", "--data", data, "--name", "toy", "--version", "4", "--utility", utility, "--store", store,
        "--label", "canary", "--epochs", "1", "--variant", "base", "--head-weight", "save=4", "--size", "hidden=16",
        "--requests-max", "40", "--tensorboard", tmp_path / "runs", "--resume", tmp_path / "run",
        "--explore", explore, "--force", "--interests", "2",
    )  # fmt: skip
    assert code == 0, output
    assert "toy@4: " in output
    published = open_model_store(str(store)).read("toy", 4).manifest.lineage
    learned = "training_requests (LightGBM)"
    assert refused.metrics[learned] + 20 < published.metrics[learned]
    assert "servers use the label stable, which toy does not have yet; set labels" in output
    assert f"pinrank model label toy stable 4 --store {store}" in output
    assert "warning: 1,200 interactions lie before 1990, the oldest on 1970-01-01" in output
    again = ("train", "--data", data, "--name", "toy", "--version", "4", "--utility", utility, "--store", store)
    code, refusal = run(*again)
    assert (code, "toy@4 is already published" in refusal) == (1, True)
    assert open_model_store(store).labels("toy") == {"canary": 4}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]
    assert len(list((tmp_path / "runs").iterdir())) == 1
    bundle = open_model_store(store).read("toy", 4)
    assert len(bundle.manifest.group("user_interests").fields) == 4
    # A server takes it: it computes what it says, and its utility table fits its heads.
    model = load_model(bundle, NumpyEngine, streams=1)
    exploration = read_exploration(bundle, load_utility(model.utility_toml, model.manifest))
    assert exploration is not None
    assert exploration.surfaces.keys() == {"home"}
    model.engine.close()
    copy_out(bundle, tmp_path / "copy")
    code, output = run(
        "evaluate", "--data", data, "--store", store, "--model", "toy", "--version", "4", "--bundle", tmp_path / "copy",
        "--baseline", "canary", "--json", tmp_path / "e.json", "--report", tmp_path / "r.html", "--requests-max", "20",
    )  # fmt: skip
    assert code == 0, output
    for expected in ("toy@4 (canary)", "copy", "popularity", "By user activity", "HIT@3 by utility"):
        assert expected in output
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert (numbers["data"], numbers["baseline"]) == ("tiny-taste", "toy@4 (canary)")
    assert {s["head"] for s in numbers["scores"]} == {"save", "like", "hide", "closeup"}
    differences = [s["hit_at_3_by_head"]["difference"]["value"] for s in numbers["scores"] if s["scorer"] == "copy"]
    assert set(differences) <= {0.0, None}
    assert "What this data cannot show" in (tmp_path / "r.html").read_text()


@needs_training
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the bundle has no destination; add --store DIR, --out DIR or both"),
        (["--out", "new", "--label", "stable"], "--label requires --store DIR"),
        (["--out", "."], ". already exists; choose a new folder"),
        (["--out", "new", "--data", "nowhere"], "there is no dataset folder nowhere; it must contain NAME.inter"),
        (["--out", "new", "--resume", "a", "--checkpoints", "b"], "--resume DIR also keeps its checkpoints in DIR"),
        (["--out", "new", "--head-weight", "save"], "--head-weight save: write HEAD=WEIGHT, e.g. save=4"),
        (
            ["--out", "new", "--head-weight", "click=2"],
            "cannot weigh the unknown head 'click'; the heads of this data are save",
        ),
        (
            ["--out", "new", "--variant", "huge"],
            "unknown variant 'huge'; choose one of base, wide, late, cross, early, published",
        ),
        (["--out", "new", "--size", "depth=3"], "--size depth=3: unknown size 'depth'; write NAME=VALUE with one of"),
        (["--out", "new", "--precision", "fp8"], "unknown precision 'fp8'; choose one of auto, fp32, bf16"),
        (["--out", "new", "--device", "tpu"], "unknown device 'tpu'; choose one of auto, cpu, cuda"),
        (["--out", "new", "--size", "hidden=8", "--size", "hidden=9"], "--size hidden=9: hidden already has a value"),
        (["--out", "new", "--size", "hidden=99999"], "--size hidden=99999: hidden can be at most 8,192"),
        (["--out", "new", "--size", "readout_rows=101"], "readout_rows can be at most 50, the length of a sequence"),
        (
            ["--out", "new", "--head-weight", "save=1", "--head-weight", "save=2"],
            "--head-weight save=2: save already has a",
        ),
        (["--out", "new", "--name", "my_model"], "'my_model' is not a valid model name; use at most 56 lower-case"),
        (["--out", "new", "--name", "m" * 57], f"'{'m' * 57}' is not a valid model name; use at most 56 lower-case"),
        (["--store", "models", "--label", "Best"], "label 'Best': use lower-case letters, digits, - and _"),
        (["--store", "utility.toml"], "model store utility.toml/ml1m/log: Not a directory"),
        (["--store", "s3://"], "model store s3://: "),
        (["--out", "utility.toml/new"], "cannot create the folder utility.toml/new: "),
        (["--out", "/proc/new"], "cannot write to /proc: "),
        (
            ["--out", "new", "--checkpoints", "utility.toml"],
            "cannot create the folder utility.toml: utility.toml is a file",
        ),
        (
            ["--out", "new", "--checkpoints", "kept"],
            "kept/checkpoint.pt already exists; use --resume kept to continue from it",
        ),
        (["--out", "new", "--tensorboard", "utility.toml"], "cannot create the folder utility.toml"),
        (["--out", "new", "--learning-rate", "0"], "learning_rate must not be 0.0"),
        (["--out", "new", "--actions", "lost.toml"], "cannot read the actions: [Errno 2] No such file"),
    ],
)
def test_train_refuses_what_cannot_work_and_says_why(
    arguments: list[str], message: str, utility: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ranker.recipe_source.svd_embeddings", worked)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "checkpoint.pt").write_bytes(b"")
    data = write_atomic(tmp_path / "data", per_user=20)
    code, output = run("train", "--utility", utility, "--data", data, *arguments)
    assert code == 1
    assert f"error: {message}" in output
    assert not (tmp_path / "new").exists()


def worked(*_: object) -> Any:
    """Stands for the first step that takes time."""
    raise AssertionError("work was done before the settings were refused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("save", "playlist_add"), "surfaces.home.utilities.pinner: unknown name 'playlist_add'; use one of closeup,"),
        (("related", "search"), "the utility table has surfaces ['home', 'search'], model toy@1 ranks ['home',"),
        (("pinner = 1.0", "ad = 1.0"), "surface 'home': weights are for ['ad'], but utilities for ['pinner']"),
        (("[surfaces.home]", "[surfaces.home"), "the utility table is not TOML"),
        (("[surfaces.home]", "a = " + 50_000 * "["), "the utility table is not TOML"),
    ],
)
def test_a_utility_table_that_no_server_would_take_is_refused_before_the_work(
    change: tuple[str, str], message: str, utility: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ranker.recipe_source.svd_embeddings", worked)
    utility.write_text(UTILITY.replace(*change))
    data, store = write_atomic(tmp_path / "data", per_user=20), tmp_path / "models"
    code, output = run(
        "train", "--utility", utility, "--data", data, "--name", "toy", "--store", store, "--label", "stable"
    )
    assert code == 1
    assert f"error: servers would reject a model with this utility table: {message}" in output
    assert "the heads of this data are save, like, hide, closeup, and the surfaces are home, related" in output
    assert open_model_store(store).versions("toy") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("home", "shop"), "explore.toml: surfaces.shop: model toy@1 ranks home, related; name one of these"),
        (("best = 4", "best = 9"), "explore.toml: surfaces.home.best: Input should be less than or equal to 8"),
    ],
)
def test_an_exploration_table_that_no_server_would_take_is_refused_before_the_work(
    change: tuple[str, str],
    message: str,
    utility: Path,
    explore: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("ranker.recipe_source.svd_embeddings", worked)
    explore.write_text(EXPLORE.replace(*change))
    data = write_atomic(tmp_path / "data", per_user=20)
    code, output = run(
        "train", "--utility", utility, "--explore", explore, "--data", data, "--name", "toy", "--out", tmp_path / "new"
    )
    assert code == 1
    assert f"error: servers would reject a model with this exploration table: {message}" in output
    assert "pass --explore with an empty file for a model that does not explore" in output


def test_a_model_explores_as_its_parent_unless_told_otherwise(explore: Path, tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    parent: Any = SimpleNamespace(bundle=SimpleNamespace(files={EXPLORATION: b"as the parent"}))
    assert BundleOptions().exploration_table(parent) == b"as the parent"
    assert BundleOptions(explore=explore).exploration_table(parent) == EXPLORE.encode()
    assert BundleOptions(explore=tmp_path / "none").exploration_table(parent) == b""
    assert BundleOptions().exploration_table(None) == b""


def test_data_without_any_action_to_predict_is_refused_before_the_work(
    utility: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ranker.recipe_source.svd_embeddings", worked)
    data = write_atomic(tmp_path / "data", per_user=20)
    (data / "actions.toml").write_text(
        '[[actions]]\nname = "save"\nmeaning = "m"\ncolumn = "rating"\nat_least = 9\naffinity = 1.0\n'
        '[[actions]]\nname = "seen"\nmeaning = "m"\naffinity = 0.5\nhead = false\n'
    )
    code, output = run("train", "--utility", utility, "--data", data, "--out", tmp_path / "new")
    assert code == 1
    assert "error: no interaction is one of the actions to predict: save" in output


@needs_training
def test_a_retired_versions_number_is_refused_before_the_work(tmp_path: Path, utility: Path) -> None:
    models = open_model_store(tmp_path / "models")
    for version in (1, 2):
        tiny.write_tiny_bundle(tmp_path / str(version), version)
        models.publish(tmp_path / str(version))
    models.gc("tiny", keep=1)
    arguments = ("train", "--utility", utility, "--data", tmp_path / "lost", "--store", models.where, "--name", "tiny")
    for version, what in ((1, "retired"), (2, "already published")):
        code, output = run(*arguments, "--version", str(version))
        assert code == 1
        assert f"error: tiny@{version} is {what}, and versions never change; use --version 3, which is free" in output


@needs_training
def test_a_utility_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, output = run("train", "--utility", tmp_path / "lost.toml", "--out", tmp_path / "new")
    assert code == 1
    assert "lost.toml" in output


@pytest.mark.parametrize(
    ("missing", "package"),
    [
        ("torch", "'pinrank[train]'"),
        ("sklearn", "'pinrank[train]'"),
        ("pyarrow", "'pinrank[data]'"),
        ("tensorboard", "'pinrank[tensorboard]'"),
        ("mlflow", "'pinrank[mlflow]'"),
        ("ray", "'pinrank[ray]'"),
        ("openvino", "openvino"),
        ("onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    missing: str, package: str, utility: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "ranker" and name != "ranker.errors":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    code, output = run("train", "--utility", utility, "--out", tmp_path / "new")
    assert code == 1
    assert f"error: this command needs {missing}, which is not installed: pip install {package}" in output


def test_training_without_openvino_names_it_before_the_work(tmp_path: Path, utility: Path) -> None:
    program = (
        "import sys, typer; sys.modules['openvino'] = None\n"
        "from ranker.cli.commands import register; app = typer.Typer(); register(app); app()"
    )
    arguments = ["train", "--utility", str(utility), "--out", str(tmp_path / "new"), "--data", "lost"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "error: this command needs openvino, which is not installed: pip install openvino\n"
    )  # fmt: skip


@needs_training
def test_train_learns_from_joined_impressions_and_refuses_a_folder_that_is_none(tmp_path: Path, utility: Path) -> None:
    from tests.ranker.training.test_shown_examples import contrary

    data, store = write_atomic(tmp_path / "data", per_user=20), tmp_path / "models"
    options = ("--data", data, "--name", "toy", "--utility", utility, "--store", store, "--epochs", "1")
    code, output = run("train", *options, "--impressions", data)
    assert code == 1
    assert "is not a joined dataset, because it has no manifest.json; write it with `pinrank impressions join" in output
    assert run("train", *options, "--with-unseen") == (1, "error: --with-unseen requires --impressions DIR")
    joined = contrary(tmp_path / "joined", requests=120)
    small = ("--variant", "base", "--size", "hidden=16")
    code, output = run("train", *options, *small, "--impressions", joined, "--label", "canary", "--force")
    assert code == 0, output
    assert "training on 60 requests with 540 rows" in output
    models = open_model_store(str(store))
    manifest = models.read("toy", models.resolve("toy", "canary")).manifest
    assert [head.name for head in manifest.heads] == ["save"]
    assert manifest.lineage.data.startswith("tiny-taste, impressions ")
