"""`pinrank explore evaluate` on a log that was written, joined and read again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from impressions.dataset import read_slates
from model_store.registry.store import open_model_store
from ranker.cli.commands import register
from tests import tiny
from tests.ranker.counterfactual import logged

app = typer.Typer()
register(app)
MORE = tiny.UTILITY.replace("creator = 0.5", "creator = 2.0")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["explore", "evaluate", "--resamples", "100", *map(str, arguments)]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    return logged.write_joined(logged.slates(), tmp_path_factory.mktemp("joined") / "joined")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """tiny@1 is stable and logged; 2 has another network; 3 is 1 with other weights; 4 is 3 that explores."""
    root = tmp_path_factory.mktemp("store")
    models = open_model_store(root / "models")
    changes = {
        1: {"explore.toml": logged.WEIGHTS.encode()},
        2: {},
        3: {"network.onnx": tiny.network(1), "utility.toml": MORE.encode()},
        4: {
            "network.onnx": tiny.network(1),
            "utility.toml": MORE.encode(),
            "explore.toml": logged.WEIGHTS.replace("0.6", "0.1").encode(),
        },
    }
    for version, files in changes.items():
        tiny.write_tiny_bundle(root / str(version), version, **files)
        models.publish(root / str(version))
    models.set_label("tiny", "stable", 1)
    models.set_label("tiny", "canary", 3)
    return root / "models"


@pytest.fixture
def more(tmp_path):
    path = tmp_path / "utility.toml"
    path.write_text(MORE)
    return path


def test_the_joined_log_is_what_was_logged(joined):
    (read,), made = read_slates(joined, "home"), logged.slates()
    np.testing.assert_array_equal(read.labels, made.labels)
    np.testing.assert_array_equal(read.propensities, made.propensities)
    np.testing.assert_array_equal(read.order_propensities, made.order_propensities)
    np.testing.assert_array_equal(read.probabilities, made.probabilities)


def test_a_table_is_compared_with_the_policy_that_logged(joined, more, tmp_path):
    numbers, report = tmp_path / "numbers.json", tmp_path / "report.html"
    code, said = run("--on", joined, "--policy", more, "--ess-min", 50, "--json", numbers, "--report", report)
    assert code == 0
    assert "utility.toml compared with logged" in said
    found = json.loads(numbers.read_text())
    assert found["rewards"] == ["pinner", "creator", "save", "hide"]
    creator = {f["estimator"]: f for f in found["units"][0]["forecasts"]["creator"]}
    difference = creator["dr"]["difference"]
    assert 0 < difference["value"] < difference["high"]  # a higher weight of the creator gives the creator more
    made = logged.slates()
    saves = made.labels[:, 0].sum() / made.requests
    assert found["units"][0]["forecasts"]["save"][0]["baseline"]["value"] == pytest.approx(saves)
    page = report.read_text()
    for expected in ("What utility.toml would have earned", "Whole orders", "Single positions", "empirical Bernstein"):
        assert expected in page
    assert "<script" not in page


def test_a_version_is_evaluated_like_its_table(joined, store, more, tmp_path):
    for name, policy in (("file", more), ("version", "tiny@3"), ("label", "tiny@canary"), ("bare", "canary")):
        code, _ = run(
            "--on", joined, "--policy", policy, "--store", store, "--ess-min", 50, "--json", tmp_path / f"{name}.json"
        )
        assert code == 0
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("file", "version", "label", "bare")]
    assert all(one["units"] == found[0]["units"] for one in found)
    assert [one["policy"] for one in found] == [
        "utility.toml", "tiny@3", "tiny@3 (tiny@canary)", "tiny@3 (canary)",
    ]  # fmt: skip


def test_stable_explores_as_it_logged_so_it_earns_what_was_logged(joined, store, more, tmp_path):
    for against in ("stable", "logged"):
        code, _ = run(
            "--on", joined, "--policy", more, "--against", against, "--store", store, "--ess-min", 50,
            "--reward", "save", "--json", tmp_path / f"{against}.json",
        )  # fmt: skip
        assert code == 0
    stable, plain = (
        json.loads((tmp_path / f"{name}.json").read_text())["units"][0]["forecasts"]["save"][0]
        for name in ("stable", "logged")
    )
    assert stable["estimator"] == "ips"
    assert stable["baseline"] == plain["baseline"]
    assert stable["baseline"]["value"] == pytest.approx(plain["baseline"]["value"], rel=1e-9)


def test_a_version_that_only_has_the_name_of_the_one_that_logged_is_refused(joined, tmp_path):
    tiny.write_tiny_bundle(tmp_path / "1", 1, **{"utility.toml": MORE.encode()})
    open_model_store(tmp_path / "other").publish(tmp_path / "1")
    code, said = run("--on", joined, "--policy", "tiny@1", "--store", tmp_path / "other")
    assert code == 1
    assert "tiny@1 of this store has another utility table than the tiny@1 that logged" in said


def test_a_version_that_explores_a_little_lies_between_its_table_and_what_logged(joined, store, tmp_path):
    values = {}
    for policy in ("tiny@3", "tiny@4"):
        path = tmp_path / f"{policy}.json"
        code, _ = run("--on", joined, "--policy", policy, "--store", store, "--ess-min", 50, "--json", path)
        assert code == 0
        forecasts = json.loads(path.read_text())["units"][0]["forecasts"]["creator"]
        values[policy] = next(f for f in forecasts if f["estimator"] == "dr")["value"]["value"]
    assert 0 < values["tiny@3"] - values["tiny@4"] < 0.1 * values["tiny@3"]


def test_positions_are_evaluated_on_request_and_estimators_chosen(joined, more):
    code, said = run(
        "--on", joined, "--policy", more, "--unit", "positions", "--estimator", "snips", "--estimator", "clipped",
        "--reward", "save", "--ess-min", 50, "--clip", 3,
    )  # fmt: skip
    assert code == 0
    assert "snips" in said
    assert "clipped" in said
    assert " dr " not in said


def test_the_bernstein_bound_is_printed_with_clipped_orders(joined, more):
    code, said = run("--on", joined, "--policy", more, "--estimator", "clipped", "--reward", "save", "--ess-min", 50)
    assert code == 0
    assert "save: weights of at most 10, empirical Bernstein bound" in said


def test_too_little_evidence_prints_no_number_and_writes_the_report(joined, more, tmp_path):
    report = tmp_path / "report.html"
    code, said = run("--on", joined, "--policy", more, "--ess-min", 5000, "--report", report)
    assert code == 1
    assert "error: refused: the effective number of users for utility.toml is" in said
    assert "at least 5000 are required" in said
    assert "What to do: explore about" in said
    assert "difference" not in said
    assert "everything was refused" in report.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "tiny@3"], "'tiny@3' names a version, which needs --store"),
        (["--policy", "nothing.toml"], "cannot read the utility table nothing.toml"),
        (["--policy", "logged"], "compares nothing; name a utility table"),
        (["--policy", "logged", "--estimator", "magic"], "--estimator magic: choose one of ips, snips"),
        (["--policy", "logged", "--unit", "pages"], "choose orders or positions"),
        (["--policy", "logged", "--ess-min", "inf"], "--ess-min inf: choose a finite number"),
        (["--policy", "logged", "--clip", "inf"], "--clip inf: choose a finite number"),
        (["--policy", "logged", "--surface", "related"], "no request of surface related"),
        (["--policy", "logged", "--model", "tiny@9"], "and model tiny@9"),
    ],
)
def test_arguments_that_cannot_be_are_explained(joined, arguments, says):
    code, said = run("--on", joined, *arguments)
    assert code == 1
    assert says in said


def test_a_version_with_another_network_is_refused_with_the_fix(joined, store):
    code, said = run("--on", joined, "--policy", "tiny@2", "--store", store)
    assert code == 1
    assert "tiny@2 has another network or calibration than tiny@1, which logged" in said
    assert "serve it as a canary" in said


def test_unknown_rewards_and_versions_are_named(joined, more, store):
    code, said = run("--on", joined, "--policy", more, "--reward", "clicks")
    assert (code, "choose one of pinner, creator, save, hide" in said) == (1, True)
    code, said = run("--on", joined, "--policy", "tiny@9", "--store", store)
    assert code == 1
    assert "9" in said


def test_a_folder_that_is_no_joined_log_is_explained(more, tmp_path):
    code, said = run("--on", tmp_path, "--policy", more)
    assert code == 1
    assert "is not a joined dataset" in said


def test_a_log_of_several_models_asks_for_one(joined, more, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(joined, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["groups"].append({**manifest["groups"][0], "model": "tiny@7"})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, said = run("--on", folder, "--policy", more, "--model", "tiny@7")
    assert code == 1
    assert "0 models" in said
