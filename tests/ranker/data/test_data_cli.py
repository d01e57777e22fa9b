from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model_store.bundle.files import Bundle, read_bundle, write_bundle
from model_store.registry.store import open_model_store
from ranker.cli.commands import register
from ranker.data.atomic.identifiers import token_id
from tests import tiny
from tests.ranker.data.test_adapters import DESKDROP_HEADER
from tests.ranker.interactions import write_atomic

DEMO_MODELS = Path(__file__).parents[3] / "deploy" / "demo" / "models"

app = typer.Typer()
register(app)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_check_shows_what_training_would_see(tmp_path: Path) -> None:
    code, output = run("check", write_atomic(tmp_path / "data"))
    assert code == 0
    assert "tiny-taste: 60 users, 90 pins, 2,400 interactions" in output
    assert "0 cold (below 10), 60 light, 0 heavy (100 or more)" in output
    assert "from 1970-01-01 to 1970-01-01" in output
    assert "closeup │ yes │ 2,400 │ 100.00% │ 480 │ 240 │ 240" in output


def test_an_adapters_output_can_be_checked_at_once(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        DESKDROP_HEADER + "".join(f"{1_000 * i},VIEW,{i % 7},{i % 5},1,,,\n" for i in range(60))
    )
    code, output = run("deskdrop", tmp_path / "log.csv", "--out", tmp_path / "out")
    assert code == 0
    assert f"wrote 60 interactions to {tmp_path / 'out'}" in output
    code, output = run("check", tmp_path / "out")
    assert code == 0
    assert "no interaction is a save fix: check its rule in actions.toml" in output
    assert "closeup occurs only 6 times in the test part, too few" in output


HEADER = "user_id:token\titem_id:token\ttimestamp:float\tseconds:float\n"
LISTEN = '[[actions]]\nname = "listen"\nmeaning = "played"\naffinity = 0.2\n'


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        (
            [(u, p, 1.7e12 + u) for u in range(9) for p in range(9)],
            1,
            "but this one looks like milliseconds; divide by 1,000",
        ),
        (
            [(t % 9, t % 50, t) for t in range(400)],
            0,
            "400 interactions lie before 1990, the oldest on 1970-01-01",
        ),
        (
            [(t % 9, t % 50, 1.7e9 + t * 1e7) for t in range(400)],
            0,
            "interactions lie in the future, the newest on 2150-04-23 fix: correct their timestamps or remove them",
        ),
        ([(u, p, 5) for u in range(9) for p in range(9)], 1, "the train part has no request fix: add more data"),
        ([(1, p, p) for p in range(50)], 1, "has 1 users and 30 pins with too few actions in common"),
        ([(t, p, t) for t in range(60) for p in (1, 2)], 0, "100% of the users have fewer than 10 events"),
        (
            [(t % 9, 1 + t % 4, t // 40) for t in range(400)],
            0,
            "interactions have the same user, pin and time as another interaction",
        ),
        ([(t % 9, t, t) for t in range(400)], 0, "100% of the interactions for training and testing are on pins"),
        ([(t % 9, t % 50, t) for t in range(400)], 0, "no action has an affinity of at least 0.5"),
    ],
)
def test_each_problem_comes_with_its_fix(
    tmp_path: Path, rows: list[tuple[int, int, float]], code: int, message: str
) -> None:
    (tmp_path / "toy.inter").write_text(HEADER + "".join(f"u{u}\tp{p}\t{t}\t1\n" for u, p, t in rows))
    (tmp_path / "actions.toml").write_text(LISTEN)
    found, output = run("check", tmp_path)
    assert message in output
    assert found == code


def test_other_actions_can_be_tried_on_the_same_data(tmp_path: Path) -> None:
    data = write_atomic(tmp_path / "data", start_s=1_700_000_000)
    (tmp_path / "other.toml").write_text(LISTEN.replace("0.2", "1.0"))
    code, output = run("check", data, "--actions", tmp_path / "other.toml")
    assert code == 0
    assert "listen │ yes │ 2,400" in output
    assert "no problems found" in output


def test_a_store_is_filled_for_the_model_that_will_read_it(tmp_path: Path) -> None:
    cache = tmp_path / "features"
    url = f"lmdb://{cache}"
    data = write_atomic(tmp_path / "data")
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", url)
    assert code == 0
    stable = open_model_store(DEMO_MODELS).resolve("ml1m", "stable")
    assert f"90 pins, 60 users, 60 sequences for ml1m@{stable} in {url}" in output
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", "ftp://x")
    assert code == 1
    assert "error: unknown feature store 'ftp://x'" in output
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", "memory://")
    assert code == 1
    assert "error: a memory:// store ends with the process that opens it" in output
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", f"{url}/no/such")
    assert code == 1
    assert f"error: cannot create the feature store {cache}/no/such: the folder {cache}/no does not exist" in output
    (data / "actions.toml").write_text(LISTEN.replace("0.2", "1.0"))
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", url)
    assert code == 1
    assert "error: the data has no action 'save'; its actions are listen" in output


def demo_bundle() -> Bundle:
    store = open_model_store(DEMO_MODELS)
    return store.read("ml1m", store.resolve("ml1m", "stable"))


def stored_model(folder: Path, *labels: str, **changes: bytes | None) -> Path:
    """Publish the demo's model with other fields or files, under labels; None for a file leaves it out."""
    bundle = demo_bundle()
    fields = {name: getattr(bundle.manifest, name) for name in type(bundle.manifest).model_fields} | {"version": 7}
    files: dict[str, bytes | None] = {**bundle.files, **{f"{name}.npz": content for name, content in changes.items()}}
    write_bundle(folder / "bundle", fields, {name: content for name, content in files.items() if content is not None})
    store = open_model_store(folder / "models")
    store.publish(folder / "bundle")
    for label in labels:
        store.set_label("ml1m", label, 7)
    return folder / "models"


def test_the_only_label_of_a_model_need_not_be_named(tmp_path: Path) -> None:
    data = write_atomic(tmp_path / "data")
    store = stored_model(tmp_path, "canary")
    arguments = (
        "fill",
        data,
        "--model",
        "ml1m",
        "--feature-store",
        f"lmdb://{tmp_path / 'features'}",
        "--store",
        store,
    )
    code, output = run(*arguments)
    assert (code, "sequences for ml1m@7 in" in output) == (0, True)
    open_model_store(store).set_label("ml1m", "blue", 7)
    code, output = run(*arguments)
    assert code == 1
    assert "has no label 'stable' (labels: blue, canary)" in output
    assert run(*arguments, "--label", "blue")[0] == 0


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (None, "ml1m@7 carries no embeddings.npz, so its features cannot be built from interactions; load them with"),
        (b"no archive", "ml1m@7: embeddings.npz: "),
    ],
)
def test_a_bundle_without_vectors_is_told_where_its_features_come_from(
    tmp_path: Path, embeddings: bytes | None, message: str
) -> None:
    store = stored_model(tmp_path, "stable", embeddings=embeddings)
    code, output = run("fill", tmp_path, "--store", store, "--model", "ml1m", "--feature-store", "memory://")
    assert code == 1
    assert f"error: {message}" in output


def test_a_model_of_other_features_is_refused_by_name(tmp_path: Path) -> None:
    bundle = demo_bundle()
    tiny.write_tiny_bundle(tmp_path / "tiny")
    plain = read_bundle(tmp_path / "tiny")
    fields = {name: getattr(plain.manifest, name) for name in type(plain.manifest).model_fields}
    groups = tuple(group.model_copy(update={"name": f"other_{group.entity}"}) for group in plain.manifest.groups)
    inputs = tuple(one for one in plain.manifest.inputs if one.name == "surface")
    fields |= {"groups": groups, "inputs": inputs, "surfaces": plain.manifest.surfaces[:1]}
    write_bundle(tmp_path / "other", fields, {**plain.files, "embeddings.npz": bundle.files["embeddings.npz"]})
    store = open_model_store(tmp_path / "models")
    store.publish(tmp_path / "other")
    store.set_label("tiny", "stable", 1)
    code, output = run(
        "fill", tmp_path, "--store", tmp_path / "models", "--model", "tiny", "--feature-store", "memory://"
    )
    assert code == 1
    assert "error: tiny@1 reads features that are not made from interactions (no feature group 'pin_core';" in output


def test_interactions_in_the_future_are_not_stored(tmp_path: Path) -> None:
    data = write_atomic(tmp_path / "data", start_s=4_000_000_000)
    url = f"lmdb://{tmp_path / 'features'}"
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", url)
    assert code == 1
    assert "error: 2,400 interactions lie in the future, the newest on 2096-10-0" in output
    assert not (tmp_path / "features").exists()


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    data = write_atomic(tmp_path / "data", name="songs[b][load]")
    (data / "actions.toml").write_text(LISTEN.replace('"played"', '"played"\ncolumn = "rating"\nat_least = 1'))
    assert "songs[b][load]: 60 users" in run("check", data)[1]
    lines = (data / "songs[b][load].inter").read_text().splitlines()
    (data / "songs[b][load].inter").write_text("\n".join([*lines[:2], "", *lines[2:]]))
    assert (
        "warning: songs[b][load].inter: 1 blank lines were skipped, the first of them line 3" in run("check", data)[1]
    )


def test_a_rule_that_every_interaction_fits_is_named(tmp_path: Path) -> None:
    rows = [f"u{t % 9}\tp{t % 50}\t1\t{1_700_000_000 + t}" for t in range(400)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "toy.inter").write_text("\n".join([header, *rows]))
    output = run("check", tmp_path)[1]
    assert "warning: every interaction is a hide: the rule for column 'rating' distinguishes nothing" in output


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    rows = [f"u{t % 9}\tp{t % 50}\t-\t{1_700_000_000 + t}" for t in range(400)]
    header = "user_id:token\titem_id:token\tdwell:float\ttimestamp:float"
    (tmp_path / "toy.inter").write_text("\n".join([header, *rows]))
    assert "toy.inter: these columns are not used: dwell" in run("check", tmp_path)[1]


def test_ids_are_those_that_the_features_are_stored_under() -> None:
    assert run("ids", "17", "song/17") == (0, f"17 17 song/17 {token_id('song/17')}")


def test_ids_of_what_no_dataset_can_hold_are_not_made_up() -> None:
    assert run("ids", "17.0") == (
        1,
        "error: '17.0' is not a valid identifier: the identifier is a whole number written as a decimal; write 17",
    )


def test_movielens_is_copied_with_actions_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_atomic(tmp_path / "pinrank" / "ml-1m", name="ml-1m")
    code, output = run("ml-1m", "--out", tmp_path / "mine")
    assert code == 0
    assert "may not be redistributed" in output.replace("it may not", "may not")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["actions.toml", "ml-1m.inter", "ml-1m.item"]
    assert run("ml-1m", "--out", tmp_path / "mine")[1].endswith("already exists; choose a new folder")
    assert run("check", tmp_path / "mine")[0] == 0
