from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ranker.atomic import token_id
from ranker.cli import register
from tests.ranker.interactions import write_atomic
from tests.ranker.test_adapters import DESKDROP_HEADER

DEMO_MODELS = Path(__file__).parents[2] / "deploy" / "demo" / "models"

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
    assert f"60 interactions in {tmp_path / 'out'}" in output
    code, output = run("check", tmp_path / "out")
    assert code == 0
    assert "no interaction is a save fix: check its rule in actions.toml" in output
    assert "closeup occurs 6 times in the test part, too seldom" in output


HEADER = "user_id:token\titem_id:token\ttimestamp:float\tseconds:float\n"
LISTEN = '[[actions]]\nname = "listen"\nmeaning = "played"\naffinity = 0.2\n'


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        (
            [(u, p, 1.7e12 + u) for u in range(9) for p in range(9)],
            1,
            "this looks like milliseconds; divide by 1,000",
        ),
        (
            [(t % 9, t % 50, t) for t in range(400)],
            0,
            "400 interactions lie before 1990, the oldest on 1970-01-01",
        ),
        (
            [(t % 9, t % 50, 1.7e9 + t * 1e7) for t in range(400)],
            0,
            "interactions lie in the future, the newest on 2150-04-23 fix: correct their timestamps or leave them out",
        ),
        ([(u, p, 5) for u in range(9) for p in range(9)], 1, "the train part has no request fix: give more data"),
        ([(1, p, p) for p in range(50)], 1, "has 1 users, 30 pins and too little that they share"),
        ([(t, p, t) for t in range(60) for p in (1, 2)], 0, "100% of the users have fewer than 10 events"),
        ([(t % 9, 1 + t % 4, t // 40) for t in range(400)], 0, "interactions repeat another's user, pin and time"),
        ([(t % 9, t, t) for t in range(400)], 0, "100% of the interactions to learn from and to test on are on pins"),
        ([(t % 9, t % 50, t) for t in range(400)], 0, "no action has an affinity of 0.5 or more"),
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
    assert f"90 pins, 60 users, 60 sequences in {url}" in output
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", "ftp://x")
    assert code == 1
    assert "error: unknown feature store 'ftp://x'" in output
    (data / "actions.toml").write_text(LISTEN.replace("0.2", "1.0"))
    code, output = run("fill", data, "--store", DEMO_MODELS, "--model", "ml1m", "--feature-store", url)
    assert code == 1
    assert "error: the data has no action 'save'; it has listen" in output


def test_ids_are_those_that_the_features_are_stored_under() -> None:
    assert run("ids", "17", "song/17") == (0, f"17 17 song/17 {token_id('song/17')}")


def test_movielens_is_copied_with_actions_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_atomic(tmp_path / "pinrank" / "ml-1m", name="ml-1m")
    code, output = run("ml-1m", "--out", tmp_path / "mine")
    assert code == 0
    assert "may not be redistributed" in output.replace("it may not", "may not")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["actions.toml", "ml-1m.inter", "ml-1m.item"]
    assert run("ml-1m", "--out", tmp_path / "mine")[1].endswith("exists already; name a new folder")
    assert run("check", tmp_path / "mine")[0] == 0
