"""Logged requests of a real server, of every kind, are ordered again from what was logged: to the bit as answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem
from typer.testing import CliRunner

from impressions.archive import write_parquet
from impressions.inspection.check import check_log
from impressions.inspection.replays import Replays
from model_store.bundle.golden import decode_golden
from model_store.exploration.explorer import Explored
from model_store.exploration.table import Exploration, load_exploration
from model_store.model.selection import select
from model_store.model.utility import UtilityTable, load_utility, weighted_sum
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2
from server.cli.main import app
from server.config_sections import SurfaceConfig
from server.scheduling.contract import Forecast
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from tests import tiny
from tests.impressions.logs import table
from tests.server.frontend import EXPLORE
from tests.server.swapping import publish

#: Few distinct utilities, so that many pins tie.
STEPS = """
[surfaces.home]
weights = { pinner = 1.0, creator = 0.5 }
[surfaces.home.utilities]
pinner = "where(save > 0.5, 1, 0) - where(hide > 0.7, 1, 0)"
creator = "where(pin.popularity > 0.5, 1, 0)"
[surfaces.related]
weights = { pinner = 0.1 }
[surfaces.related.utilities]
pinner = "where(save > 0.6, 2, where(save > 0.3, 1, 0))"
"""
#: Each kind on the surface where the other version has the other kind.
OTHER_EXPLORE = b"""
seed = 8
[surfaces.home]
kind = "order"
share = 0.6
regret_max = 0.5
best = 4
temperature = 1.0
floor = 0.0
[surfaces.related]
kind = "weights"
share = 0.6
regret_max = 1.0
[surfaces.related.arms.reverse]
weights = { pinner = -1.0 }
[surfaces.related.arms.even]
weights = { pinner = 0.0 }
"""
#: The most candidates for which stable's model is predicted to be in time.
IN_TIME = 25


@pytest.fixture
def overloaded(store, monkeypatch):
    """Let the prediction say that stable's model is late with more than a few candidates.

    The admission then trims requests or takes the cheaper model, as its surfaces say. Requests that it degrades explore
    as well here, because they must replay all the same.
    """

    def forecast(_, ticket, now_s):
        late = ticket.model == store.read("tiny", 3).digest and ticket.rows > IN_TIME
        return Forecast(now_s + 3_600 * late, 0)

    monkeypatch.setattr(EarliestDeadlineFirst, "forecast", forecast)
    monkeypatch.setattr("server.request.pipeline._CALM_S", 0.0)


def drawn_request(rng, i):
    """Return the fields of a request: with candidates, users and queries of which some are not in the store."""
    count = int(rng.integers(1, 50))
    pins = rng.choice(np.arange(1, 61, dtype=np.uint64), count, replace=False).tolist()
    fields = {"pins": pins, "user_id": int(rng.integers(1, 6)), "top_k": int(rng.choice([0, 0, 1, 2, 7, count + 3]))}
    if i % 5 == 0:
        fields["label"] = "canary"
    if i % 2:
        fields["surface"] = "related"
        if i % 4 == 1:
            embedding = ranking_pb2.QueryEmbedding(space="tiny@1", values=rng.normal(size=tiny.DIM))
            fields["query"] = ranking_pb2.Query(embedding=embedding)
    return fields


@dataclass
class Version:
    """A version's utility table and exploration, read from its bundle's files."""

    table: UtilityTable
    exploration: Exploration

    @staticmethod
    def of(version: int, utility: str, explore: bytes) -> Version:
        table = load_utility(utility.encode(), tiny.manifest(version))
        return Version(table, load_exploration(explore, tiny.manifest(version), table))

    def check_columns(self, row, sent, answer, rng):
        """Order the returned pins again from their columns, given in another order than the log's."""
        explorer = self.exploration.surfaces[row["surface"]]
        parties = np.reshape(row["party_utilities"], (len(row["pin_ids"]), len(row["parties"])))
        utilities = weighted_sum(parties, np.array(row["party_weights"]))
        np.testing.assert_array_equal(utilities, np.float32(answer.utilities))
        shuffled = rng.permutation(len(utilities))
        pins, places = np.array(row["pin_ids"], np.uint64)[shuffled], np.array(row["places"], np.uint32)[shuffled]
        again = explorer.replay(row["request_id"], row["arm"], pins, places, utilities[shuffled])
        assert pins[again].tolist() == list(answer.pin_ids)
        assert [sent["pins"][place] for place in places[again]] == list(answer.pin_ids)

    def check_stored_rows(self, row, sent, answer):
        """Draw the arm and choose the order again, from the stored rows of all candidates that had scores."""
        (kept,) = decode_golden(row["features"])
        surface, explorer = row["surface"], self.exploration.surfaces[row["surface"]]
        pins, scored = np.array(sent["pins"], np.uint64), kept.fetched.candidates
        parties = np.full((len(pins), len(row["parties"])), np.nan)
        parties[:scored] = self.table.party_utilities(surface, kept.probabilities, kept.fetched)
        tuned = weighted_sum(parties, self.table.surfaces[surface].weights)
        decision = explorer.explore(row["request_id"], pins, parties, tuned, sent["top_k"])
        arm, order, utilities = None, select(tuned, sent["top_k"]), tuned
        if isinstance(decision, Explored):
            arm, order, utilities = decision.arm, decision.order, decision.utilities
        assert row["arm"] == arm
        assert pins[order].tolist() == list(answer.pin_ids)
        np.testing.assert_array_equal(utilities[order], np.float32(answer.utilities))
        chances = explorer.propensities(parties, order)
        assert (row["order_propensity"], row["propensities"]) == (chances.order, chances.positions.tolist())
        assert dict(row["degradation"]).get("pins_trimmed", 0) == len(pins) - scored


def kinds_of(row, sent, answer):
    """Name what is special about a request."""
    scored = np.isfinite(answer.utilities)
    utilities = np.sort(np.array(answer.utilities)[scored])
    trimmed, explored = answer.degradation.pins_trimmed > 0, row["arm"] is not None
    kinds = {
        "explored": explored,
        "a part of the candidates returned": len(answer.pin_ids) < len(sent["pins"]),
        "trimmed": trimmed,
        "trimmed, and pins without scores returned": not scored.all(),
        "trimmed and explored": trimmed and explored,
        "cheaper model": answer.degradation.cheaper_model,
        "cheaper model and explored": answer.degradation.cheaper_model and explored,
        "other label": row["label"] == "canary",
        "query vector": row["query_vector"] is not None,
        "ties": (np.diff(utilities) == 0).any(),
        f"{row['model']} on {row['surface']}": True,
    }
    return [kind for kind, present in kinds.items() if present]


@pytest.mark.parametrize("engine", ["numpy", "openvino"])
@pytest.mark.parametrize("utility", [tiny.UTILITY, STEPS], ids=["smooth", "ties"])
@pytest.mark.usefixtures("overloaded")
async def test_every_kind_of_logged_request_replays_to_the_answer_that_its_caller_got(
    logging, store, tmp_path, engine, utility
):
    versions = {}
    for version, label, explore in ((3, "stable", EXPLORE), (4, "canary", OTHER_EXPLORE)):
        publish(store, tmp_path, version, **{"explore.toml": explore, "utility.toml": utility.encode()})
        store.set_label("tiny", label, version)
        versions[f"tiny@{version}"] = Version.of(version, utility, explore)
    surfaces = {
        "home": SurfaceConfig(overload=("trim",), trim_candidates_min=1),
        "related": SurfaceConfig(overload=("cheaper",), cheaper_label="canary"),
    }
    _, frontend, rows = await logging(
        impressions={"features_share": 1.0}, engine=engine, surfaces=surfaces, labels=("stable", "canary")
    )
    rng = np.random.default_rng(5)
    requests = [drawn_request(rng, i) for i in range(160)]
    answers = [await frontend.rank(**sent) for sent in requests]
    logged = {row["request_id"]: row for row in await rows()}
    assert len(logged) == len(requests)
    found = Counter()
    for sent, answer in zip(requests, answers, strict=True):
        row = logged[answer.request_id]
        version = versions[row["model"]]
        assert (row["explorer"], row["explore_seed"]) == (version.exploration.digest, version.exploration.seed)
        assert row["arm"] == (answer.exploration.arm or None)
        version.check_columns(row, sent, answer, rng)
        version.check_stored_rows(row, sent, answer)
        found.update(kinds_of(row, sent, answer))
    assert len(found) == 14, found
    assert min(found.values()) >= 3, found
    if utility == STEPS:
        assert found["ties"] > 80, found
    assert {row["arm"] for row in logged.values()} >= {None, "more_creator", "less_creator", "best-5"}
    assert list(check_log(str(tmp_path / "log"), 1 << 42, replays=Replays(store))) == []


def changed_ids(folder):
    """Give answers whose order was drawn other ids, from which another order follows."""
    for path in folder.glob("impressions/*/*.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["request_id"] ^= (1 << 40) * (row["arm"] == "best-5")
        write_parquet(table("impressions", rows), str(path), LocalFileSystem())


async def test_the_check_of_a_log_draws_its_drawn_orders_again(logging, store, tmp_path):
    _, frontend, rows = await logging()
    for user_id in range(60):
        await frontend.rank(surface="related", user_id=user_id, top_k=4 * (user_id % 3))
    drawn = [row["arm"] for row in await rows()].count("best-5")
    assert drawn > 5

    def check(*options):
        result = CliRunner().invoke(app, ["impressions", "check", str(tmp_path / "log"), *options])
        return result.exit_code, result.output

    ours = ("--store", str(store.where))
    assert check(*ours) == (0, "no problems found\n")
    changed_ids(tmp_path / "log")
    assert check() == (0, "no problems found\n")
    code, output = check(*ours)
    assert code == 1
    assert "pin_ids: not the order that its arm draws for this request and its pins" in output
    elsewhere = open_model_store(tmp_path / "elsewhere")
    code, output = check("--store", str(elsewhere.where))
    assert code == 0
    assert f"note: impressions: {drawn} orders that tiny@2 drew were not drawn again: " in output
    publish(elsewhere, tmp_path / "other", 2, **{"explore.toml": OTHER_EXPLORE})
    code, output = check("--store", str(elsewhere.where))
    assert code == 0
    assert "were not drawn again: the store has another version of that number; name the store that" in output
