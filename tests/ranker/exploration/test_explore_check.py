"""`pinrank explore check` on tables for the tiny model, alone and with a joined log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from model_store.exploration.explorer import Explored, Withheld
from model_store.exploration.table import load_exploration
from model_store.model.discount import discounts
from model_store.model.utility import load_utility, weighted_sum
from ranker.cli.commands import register
from ranker.exploration.preview import effective_users, preview
from ranker.tuning.orders import ScoredRequests
from tests import tiny
from tests.ranker.counterfactual import logged
from tests.ranker.tuning.logged import join_answers, publish_tiny

app = typer.Typer()
register(app)
UTILITY = load_utility(tiny.UTILITY.encode(), tiny.manifest())
TUNED = UTILITY.surfaces["home"].weights


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["explore", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def explorer(content: str):
    return load_exploration(content.encode(), tiny.manifest(), UTILITY).surfaces["home"]


def scored(requests: int = 200, rows: int = 6, per_user: int = 4, top_k: int = 0) -> ScoredRequests:
    rng = np.random.default_rng(5)
    utilities = rng.normal(0.3, 0.2, (requests * rows, 2))
    return ScoredRequests(
        ("pinner", "creator"), np.arange(requests) // per_user, np.arange(requests + 1) * rows, utilities, top_k
    )


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("content", [logged.WEIGHTS, logged.ORDER], ids=["weights", "order"])
def test_shares_and_regrets_are_those_of_the_server_s_explorer(content, top_k):
    content = content.replace("regret_max = 1.0", "regret_max = 0.05").replace("share = 0.6", "share = 0.8")
    requests, made = scored(top_k=top_k), explorer(content)
    found = preview(requests, TUNED, made)
    # The explorer itself, over many request ids.
    counts: dict[str, int] = {}
    regret = scale = 0.0
    for number in range(requests.requests):
        utilities = requests.utilities[6 * number : 6 * number + 6]
        total = weighted_sum(utilities, TUNED)
        for turn in range(30):
            request_id = 30 * number + turn + 1
            best = np.sort(total.astype(float))[::-1][: top_k or 6]
            scale += float(discounts(len(best)) @ np.abs(best))
            answer = made.explore(request_id, np.arange(6, dtype=np.uint64), utilities, total, top_k)
            if isinstance(answer, Withheld):
                counts["withheld"] = counts.get("withheld", 0) + 1
            elif isinstance(answer, Explored):
                counts[answer.arm] = counts.get(answer.arm, 0) + 1
                regret += answer.regret
    drawn = 30 * requests.requests
    assert found.cost == pytest.approx(regret / scale, rel=0.15)
    assert sum(arm.chance for arm in found.arms) == pytest.approx(0.8)
    withheld = sum(arm.chance * arm.withheld for arm in found.arms)
    assert withheld == pytest.approx(counts.get("withheld", 0) / drawn, abs=0.01)
    for arm in found.arms:
        if arm.arm != "withheld":
            assert arm.chance * (1 - arm.withheld) == pytest.approx(counts[arm.arm] / drawn, abs=0.01)
            assert arm.regret is None or 0 <= arm.regret <= 0.05
            assert arm.different <= 1 - arm.withheld


def test_effective_users_are_what_logging_with_the_arms_gives():
    # Of 400 users, each request's order has a propensity of 0.5 or 0.05; weights drawn many times agree.
    rng = np.random.default_rng(1)
    users, propensities = np.arange(1_200) // 3, np.where(rng.random(1_200) < 0.5, 0.5, 0.05)
    drawn = (rng.random((2_000, 1_200)) < propensities) / propensities
    by_user = drawn.reshape(2_000, 400, 3).sum(axis=2)
    expected = by_user.sum(axis=1).mean() ** 2 / (by_user**2).sum(axis=1).mean()
    assert effective_users(users, propensities) == pytest.approx(expected, rel=0.02)
    assert effective_users(np.arange(50), np.ones(50)) == 50
    assert effective_users(np.arange(50), np.repeat([1.0, 0.0], 25)) == 25
    assert effective_users(np.arange(50), np.zeros(50)) == 0


def test_the_check_foresees_the_effective_users_of_an_evaluation(tmp_path):
    joined = logged.write_joined(logged.slates(), tmp_path / "joined")
    publish_tiny(tmp_path, 1, {"explore.toml": logged.WEIGHTS.encode()})
    (tmp_path / "explore.toml").write_text(logged.WEIGHTS)
    code, said = run(
        "check", tmp_path / "explore.toml", "--model", "tiny@1", "--store", tmp_path / "models", "--on", joined
    )
    assert code == 0, said
    assert "60% of the requests explore, by the weights of more, less" in said
    row = said[said.index("│ more ") :].split("│")
    foreseen = float(row[6])
    (tmp_path / "utility.toml").write_text(tiny.UTILITY.replace("creator = 0.5", "creator = 2.0"))
    code, _ = run(
        "evaluate", "--on", joined, "--policy", tmp_path / "utility.toml", "--ess-min", 50, "--resamples", 100,
        "--json", tmp_path / "found.json",
    )  # fmt: skip
    assert code == 0
    (orders, _) = json.loads((tmp_path / "found.json").read_text())["units"]
    assert foreseen == pytest.approx(orders["overlap"]["effective_users"], rel=0.1)


def test_a_table_alone_is_checked_without_a_log(tmp_path):
    publish_tiny(tmp_path)
    for content, told in (
        (
            logged.WEIGHTS,
            "home: 60% of the requests explore, by the weights of more, less, and give up at most 100% of",
        ),
        (logged.ORDER, "home: 80% of the requests explore, by drawn orders of up to 4 candidates"),
    ):
        (tmp_path / "explore.toml").write_text(content)
        code, said = run("check", tmp_path / "explore.toml", "--model", "tiny@1", "--store", tmp_path / "models")
        assert code == 0, said
        assert "explore.toml fits tiny@1" in said
        assert told in said


@pytest.mark.parametrize(
    ("content", "model", "told"),
    [
        (
            logged.WEIGHTS.replace("creator = 2.0", "author = 2.0"),
            "tiny@1",
            "surfaces.home.arms.more.weights: 'author' is",
        ),
        ("seed = 1", "tiny@1", "explore.toml: surfaces: Field required"),
        (logged.WEIGHTS, "tiny", "--model tiny: write NAME@VERSION or NAME@LABEL"),
        (logged.WEIGHTS, "tiny@9", "has no version 9"),
    ],
)
def test_a_table_that_a_server_would_refuse_is_named(tmp_path, content, model, told):
    publish_tiny(tmp_path)
    (tmp_path / "explore.toml").write_text(content)
    code, said = run("check", tmp_path / "explore.toml", "--model", model, "--store", tmp_path / "models")
    assert code == 1
    assert told in said


def test_a_surface_without_logged_requests_is_named_and_the_others_are_shown(tmp_path):
    publish_tiny(tmp_path)
    joined = join_answers(tmp_path / "joined")
    both = logged.ORDER.replace("[surfaces.home]", "[surfaces.related]") + logged.WEIGHTS.replace("seed = 5", "")
    (tmp_path / "explore.toml").write_text(both)
    code, said = run(
        "check", tmp_path / "explore.toml", "--model", "tiny@1", "--store", tmp_path / "models", "--on", joined
    )
    assert code == 1
    assert "home: 120 requests of 40 users" in said
    assert "warning: 120 of 120 answers do not hold all candidates of their requests; in these, an arm could" in said
    assert "error: related: " in said
