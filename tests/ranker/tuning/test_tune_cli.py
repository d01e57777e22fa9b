"""`pinrank tune` and then `pinrank model retune`, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import EXPLORATION, GOLDEN, NETWORK, UTILITY, Bundle
from model_store.model.loaded import load_model
from model_store.model.utility import load_utility
from model_store.registry.signing import TrustedKeys
from model_store.registry.store import ModelStore, open_model_store
from server.cli import model_retune
from server.cli.main import app
from server.cli.models import proven
from tests import tiny
from tests.conftest import needs_training
from tests.ranker.interactions import write_atomic
from tests.ranker.tuning.logged import join_answers, publish_tiny

EXPLORE = """
seed = 7
[surfaces.home]
kind = "weights"
share = 0.0125
regret_max = 0.05
[surfaces.home.arms.more]
weights = { creator = 0.8 }
"""


def run(*arguments: str | Path) -> tuple[int, str]:
    # Rich wraps at the terminal's width; messages are compared without their line breaks.
    result = CliRunner(env={"COLUMNS": "240"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def answered(tmp_path: Path) -> ModelStore:
    store = publish_tiny(tmp_path)
    join_answers(tmp_path / "joined")
    return store


def tune(folder: Path, *more: str | Path, thetas: tuple[str, ...] = ("creator=+1%",)) -> tuple[int, str]:
    return run(
        "tune", "--model", "tiny@1", "--store", folder / "models", "--on", folder / "joined", "--at-least", *thetas,
        "--out", folder / "utility.toml", *more,
    )  # fmt: skip


def test_logged_answers_become_a_version_with_tuned_weights(tmp_path: Path, answered: ModelStore) -> None:
    code, output = tune(tmp_path, "--report", tmp_path / "tune.html")
    assert code == 0, output
    for expected in (
        "84 requests of 28 users", "duality gap: ", "binding constraints: creator", "held out, 36 requests of 12 other",
        "alert PinrankPartyBelowTheta", "if on home creator gets less than its theta",
        f"publish it: pinrank model retune tiny 1 --utility {tmp_path}/utility.toml",
    ):  # fmt: skip
        assert expected in output
    page = (tmp_path / "tune.html").read_text()
    assert "What each theta costs" in page
    assert "data:image/svg+xml" in page

    code, output = run(
        "model", "retune", "tiny", "1", "--utility", tmp_path / "utility.toml", "--label", "canary", "--store",
        tmp_path / "models", "--engine", "numpy",
    )  # fmt: skip
    assert code == 0, output
    assert "published tiny@2, the network of tiny@1" in output
    assert answered.labels("tiny") == {"canary": 2}
    old, new = answered.read("tiny", 1), answered.read("tiny", 2)
    assert {name for name in old.files if old.files[name] != new.files[name]} == {UTILITY}
    tuning = new.manifest.lineage.tuning["home"]
    home = load_utility(new.files[UTILITY], new.manifest).surfaces["home"]
    assert new.manifest.lineage.parent == "tiny@1"
    assert tuning.thetas == dict(home.at_least)
    assert home.weights[1] != 0.5

    # It loads, which proves its golden requests, and its probabilities are its parent's to the bit.
    batch = tiny.fetched([1, 2, 3, 4], [5, 6])
    scores = []
    for bundle in (old, new):
        model = load_model(bundle, NumpyEngine, streams=1, warm=False)
        scores.append(model.probabilities(model.engine.run(model.assembler.assemble(batch, "home"))))
        model.engine.close()
    assert np.array_equal(scores[0], scores[1])

    code, output = run("model", "diff", "tiny", "1", "canary", "--store", tmp_path / "models", "--all")
    assert code == 0, output
    for expected in (
        "pinner x 1, creator x 0.5",
        "creator >= ",
        "lineage.tuning.home",
        "the most for pinner on 84 req",
    ):
        assert expected in output


def test_answers_of_a_retuned_version_are_tuned_on_with_those_of_its_parent(
    tmp_path: Path, answered: ModelStore
) -> None:
    assert tune(tmp_path)[0] == 0
    assert retune(tmp_path)[0] == 0
    folder = join_answers(tmp_path / "later", model="tiny@2", seed=1)
    code, output = run(
        "tune", "--model", "tiny@1", "--store", tmp_path / "models", "--on", folder, "--at-least", "creator=+1%"
    )
    assert code == 0, output


def retune(folder: Path, *more: str | Path, version: str = "1") -> tuple[int, str]:
    return run(
        "model", "retune", "tiny", version, "--utility", folder / "utility.toml", "--store", folder / "models",
        "--engine", "numpy", *more,
    )  # fmt: skip


@pytest.mark.parametrize("repeated", [True, False], ids=["option repeated", "values after one option"])
def test_several_thetas_are_given_either_way(tmp_path: Path, answered: ModelStore, repeated: bool) -> None:
    texts = ("creator=+900%", "pinner=0")
    more = ("--at-least", texts[1]) if repeated else ()
    code, output = tune(tmp_path, *more, thetas=texts[:1] if repeated else texts)
    assert code == 1
    assert "pinner is maximised, so it cannot have a theta as well" in output


def test_a_theta_in_force_that_is_not_asked_for_again_is_named(tmp_path: Path) -> None:
    # Four parties: two have a theta in force, one of which is asked for.
    stated = "creator = 0.5, ad = 0.1, shop = 0.1 }\nat_least = { creator = 0.2, ad = 0.3, pinner = -9.0 }"
    table = tiny.UTILITY.replace("creator = 0.5 }", stated).replace(
        "\n\n[surfaces.related]", '\nad = "hide"\nshop = "save"\n\n[surfaces.related]'
    )
    publish_tiny(tmp_path, 1, {"utility.toml": table.encode()})
    join_answers(tmp_path / "joined")
    code, output = tune(tmp_path, "--report", tmp_path / "tune.html")
    assert code == 0, output
    for kind in (output, (tmp_path / "tune.html").read_text()):
        assert "the table in force requires ad" in kind
        assert "to keep it, add --at-least ad=0.3" in kind
        assert "as it is maximised now, that is gone" in kind
    assert "add --at-least creator" not in output


def test_thetas_that_no_order_meets_end_with_what_is_attainable(tmp_path: Path, answered: ModelStore) -> None:
    code, output = tune(tmp_path, thetas=("creator=+900%",))
    assert code == 1
    assert "no orders meet these thetas: creator must get " in output
    assert "The most for each party alone: creator=0." in output
    assert not (tmp_path / "utility.toml").exists()


def test_a_constant_that_is_better_for_a_few_users_only_stays_and_everything_says_so(
    tmp_path: Path, answered: ModelStore
) -> None:
    code, output = tune(tmp_path, "--free", "hide in [1.9,2.1]", "--trials", "4", "--report", tmp_path / "tune.html")
    assert code == 0, output
    table, page = (tmp_path / "utility.toml").read_text(), (tmp_path / "tune.html").read_text()
    assert load_utility(table.encode(), tiny.manifest()).surfaces["home"].sources[0] == "save - 2 * hide"
    for text in (output, table, page):
        assert "hide, 2 in force: stays; " in text
        assert "not above 0" in text


def test_a_constant_is_searched_and_written(tmp_path: Path, answered: ModelStore) -> None:
    code, output = tune(tmp_path, "--free", "hide in [0.5,1.5]", "--trials", "4")
    assert code == 0, output
    assert "constant pinner: hide, 2 in force: -> " in output
    assert "because the held-out users gain by it" in (tmp_path / "utility.toml").read_text()
    assert "what the held-out users' actions are worth per request" in output
    table = load_utility((tmp_path / "utility.toml").read_bytes(), tiny.manifest()).surfaces["home"]
    assert table.sources[0].startswith("save - ")
    assert table.sources[0] != "save - 2 * hide"
    assert retune(tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("whole", "told"),
    [
        (120, ""),
        (0, "120 of 120 answers do not hold all candidates of their requests, and none does, so all were tuned on"),
    ],
    ids=["whole", "cut"],
)
def test_answers_that_left_candidates_out_are_counted_in_the_output_the_report_and_the_table(
    tmp_path: Path, whole: int, told: str
) -> None:
    publish_tiny(tmp_path)
    join_answers(tmp_path / "joined", whole=whole)
    code, output = tune(tmp_path, "--report", tmp_path / "tune.html")
    assert code == 0, output
    for text in (output, (tmp_path / "tune.html").read_text(), (tmp_path / "utility.toml").read_text()):
        assert ("could only reorder the pins that were shown" in text) is bool(told)
        assert told in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at-least", "creator"], "--at-least creator: write PARTY=VALUE"),
        (["--at-least", "author=1"], "there is no party 'author'; the parties are pinner, creator"),
        (["--at-least", "creator=1", "--surface", "shop"], "does not rank the surface 'shop'; it ranks home, related"),
        (["--at-least", "creator=1", "--model", "tiny"], "write NAME@VERSION or NAME@LABEL, e.g. ml1m@stable"),
        (["--at-least", "creator=1", "--model", "tiny@9"], "has no version 9"),
        (["--at-least", "creator=1", "--on", "nowhere"], "nowhere is not a joined dataset"),
        (["--at-least", "creator=1", "--data", "ml-1m"], "say what to tune on: either --on DIR"),
        (["--at-least", "creator=1", "--out", "no/where.toml"], "the folder no does not exist; create it first"),
        (["--at-least", "creator=1", "--free", "hide"], 'write "NAME in [LOW, HIGH]"'),
    ],
)
def test_bad_input_to_tune_is_a_named_error(
    tmp_path: Path, answered: ModelStore, arguments: list[str], message: str
) -> None:
    defaults = {"--model": "tiny@1", "--store": str(tmp_path / "models"), "--on": str(tmp_path / "joined")}
    given = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    if "--data" in arguments:
        given = [*given, "--on", "joined"] if "--on" not in given else given
    code, output = run("tune", *given, *arguments)
    assert code == 1, output
    assert message in output


def test_a_table_by_hand_makes_a_version_without_a_statement(tmp_path: Path) -> None:
    store = publish_tiny(tmp_path)
    (tmp_path / "utility.toml").write_text(tiny.UTILITY.replace("creator = 0.5", "creator = 0.7"))
    assert retune(tmp_path)[0] == 0
    bundle = store.read("tiny", 2)
    assert bundle.manifest.lineage.tuning == {}
    assert "tuning" not in json.loads(bundle.manifest_json)["lineage"]  # servers of before read it too


def test_retune_takes_the_next_free_version_and_a_label_for_its_parent(tmp_path: Path) -> None:
    store = publish_tiny(tmp_path)
    publish_tiny(tmp_path, 7)
    store.set_label("tiny", "stable", 1)
    (tmp_path / "utility.toml").write_text(tiny.UTILITY)
    code, output = retune(tmp_path, version="stable")
    assert code == 0, output
    assert "published tiny@8, the network of tiny@1" in output
    assert store.read("tiny", 8).files[NETWORK] == store.read("tiny", 1).files[NETWORK]
    assert store.read("tiny", 8).files[GOLDEN] == store.read("tiny", 1).files[GOLDEN]
    assert store.history("tiny")[-1].why == "tiny@1 with another utility table"


def test_an_exploration_table_alone_keeps_the_utility_table_and_what_it_states(
    tmp_path: Path, answered: ModelStore
) -> None:
    assert tune(tmp_path)[0] == 0
    assert retune(tmp_path)[0] == 0
    (tmp_path / "explore.toml").write_text(EXPLORE)
    arguments = ("model", "retune", "tiny", "2", "--store", tmp_path / "models", "--engine", "numpy")
    code, output = run(*arguments, "--explore", tmp_path / "explore.toml")
    assert code == 0, output
    old, new = answered.read("tiny", 2), answered.read("tiny", 3)
    assert new.files[UTILITY] == old.files[UTILITY] == (tmp_path / "utility.toml").read_bytes()
    assert new.files[EXPLORATION] == EXPLORE.encode()
    assert new.manifest.lineage.tuning == old.manifest.lineage.tuning != {}
    assert answered.history("tiny")[-1].why == "tiny@2 with another exploration table"
    code, output = run(*arguments)
    assert code == 1
    assert "say what to change: --utility FILE, --explore FILE, or both" in output
    code, output = retune(tmp_path, "--explore", tmp_path / "explore.toml")
    assert answered.history("tiny")[-1].why == "tiny@1 with another utility and exploration table"


def test_a_number_that_another_writer_takes_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rivals = publish_tiny(tmp_path), iter([2, 3])

    def proven_while_others_publish(bundle: Bundle, engine: str) -> float:
        if (rival := next(rivals, None)) is not None:
            publish_tiny(tmp_path, rival)
        return proven(bundle, engine)

    monkeypatch.setattr(model_retune, "proven", proven_while_others_publish)
    (tmp_path / "utility.toml").write_text(tiny.UTILITY.replace("creator = 0.5", "creator = 0.7"))
    code, output = retune(tmp_path, "--label", "canary")
    assert code == 0, output
    assert "published tiny@4, the network of tiny@1" in output
    assert sorted(store.state("tiny").versions) == [1, 2, 3, 4]
    assert store.labels("tiny") == {"canary": 4}
    assert store.read("tiny", 4).manifest.version == 4


def test_a_retuned_version_is_signed_if_asked_for(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    store, key = publish_tiny(tmp_path), Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "key.pub.pem").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "utility.toml").write_text(tiny.UTILITY)
    code, output = retune(tmp_path, "--sign", tmp_path / "key.pem")
    assert code == 0, output
    release = store.release("tiny", 2)
    TrustedKeys.read([tmp_path / "key.pub.pem"]).check("tiny@2", release.digest, release.signature)


@pytest.mark.parametrize(
    ("table", "more", "message"),
    [
        (tiny.UTILITY.replace("surfaces.related", "surfaces.shop"), (), "the utility table has surfaces"),
        (tiny.UTILITY.replace("save - 2", "saves - 2"), (), "unknown name 'saves'"),
        (tiny.UTILITY, ("--label", "Best"), "label 'Best': use lower-case letters"),
        (tiny.UTILITY, ("--sign", "nowhere.pem"), "nowhere.pem is not an unencrypted PEM private key"),
    ],
    ids=["surface", "name", "label", "key"],
)
def test_a_version_that_servers_would_refuse_is_not_published(
    tmp_path: Path, table: str, more: tuple[str, ...], message: str
) -> None:
    store = publish_tiny(tmp_path)
    (tmp_path / "utility.toml").write_text(table)
    code, output = retune(tmp_path, *more)
    assert code == 1
    assert message in output
    assert sorted(store.state("tiny").versions) == [1]


def test_an_exploration_table_comes_with_the_version_and_stays_without_the_option(tmp_path: Path) -> None:
    store = publish_tiny(tmp_path)
    (tmp_path / "utility.toml").write_text(tiny.UTILITY)
    (tmp_path / "explore.toml").write_text(EXPLORE)
    assert retune(tmp_path, "--explore", tmp_path / "explore.toml")[0] == 0
    assert retune(tmp_path, version="2")[0] == 0
    assert store.read("tiny", 3).files[EXPLORATION] == EXPLORE.encode()
    (tmp_path / "explore.toml").write_text("")
    assert retune(tmp_path, "--explore", tmp_path / "explore.toml", version="3")[0] == 0
    assert EXPLORATION not in store.read("tiny", 4).files
    (tmp_path / "explore.toml").write_text(EXPLORE.replace("creator", "author"))
    code, output = retune(tmp_path, "--explore", tmp_path / "explore.toml")
    assert (code, "author" in output) == (1, True)


@needs_training
def test_the_test_part_of_a_dataset_is_scored_and_tuned_on(tmp_path: Path) -> None:
    data, store = write_atomic(tmp_path / "data", per_user=20), tmp_path / "models"
    (tmp_path / "before.toml").write_text(
        "[surfaces.home]\nweights = { pinner = 1.0, creator = 0.1 }\n"
        'utilities = { pinner = "save - hide", creator = "save * pin.creator_tail" }\n'
        '[surfaces.related]\nweights = { pinner = 1.0 }\nutilities = { pinner = "save" }\n'
    )
    code, output = run(
        "train", "--data", data, "--name", "toy", "--utility", tmp_path / "before.toml", "--store", store, "--epochs",
        "1", "--variant", "base", "--size", "hidden=16", "--requests-max", "40",
        "--force",  # after one epoch, it is worse than the dot product
    )  # fmt: skip
    assert code == 0, output
    code, output = run(
        "tune", "--model", "toy@1", "--store", store, "--data", data, "--at-least", "creator=+2%", "--out",
        tmp_path / "utility.toml",
    )  # fmt: skip
    assert code == 0, output
    manifest = open_model_store(store).manifest("toy", 1)
    home = load_utility((tmp_path / "utility.toml").read_bytes(), manifest).surfaces["home"]
    assert home.at_least.keys() == {"creator"}
