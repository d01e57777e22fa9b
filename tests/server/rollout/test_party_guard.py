"""What the guard thinks of a label whose parties get less, in numbers and on a server."""

from __future__ import annotations

import math

import pytest

from model_store.model.utility import load_utility
from server.config import GuardConfig
from server.request.parties import PartyMean
from server.rollout.guard import Breach
from server.rollout.party_guard import PartyOfSurface, compared, judge_parties
from tests import tiny
from tests.conftest import eventually
from tests.server.swapping import ALIKE, held, own_golden, publish, sample


def party(own, default=None, theta=None):
    return PartyOfSurface("home", "creator", own, default, theta)


def mean(value, error=0.125, requests=100):
    return PartyMean(requests, value, error)


@pytest.mark.parametrize(
    ("given", "breach"),
    [
        pytest.param(party(mean(0.5), theta=1.0), None, id="below theta within 4 standard errors"),
        pytest.param(
            party(mean(0.25), theta=1.0),
            "the utility of creator on home is 0.25 (standard error 0.12, 100 requests) per request, "
            "but at_least requires 1",
            id="below theta",
        ),
        pytest.param(party(mean(0.25, requests=99), theta=1.0), None, id="too few of its own"),
        pytest.param(party(mean(0.25, math.inf, 1), theta=1.0), None, id="one request"),
        pytest.param(party(mean(0.25)), None, id="nothing to compare with"),
        pytest.param(party(mean(2.0, 0.0), mean(2.5, 0.0)), None, id="the largest loss"),
        pytest.param(
            party(mean(1.96, 0.0), mean(2.5, 0.0)),
            "the utility of creator on home is 1.96 (standard error 0, 100 requests) per request, against the default "
            "label's 2.5 (standard error 0, 100 requests); the limit is 20% less",
            id="lost more",
        ),
        pytest.param(party(mean(1.0, 0.1), mean(2.0, 0.2)), None, id="lost more within noise"),
        pytest.param(party(mean(1.0, 0.0), mean(2.0, 0.0, 99)), None, id="too few of the default's"),
        pytest.param(party(mean(-1.1, 0.0), mean(-1.0, 0.0)), None, id="a negative mean, within its amount"),
        pytest.param(
            party(mean(-1.3, 0.0), mean(-1.0, 0.0)),
            "the utility of creator on home is -1.3 (standard error 0, 100 requests) per request, against the default "
            "label's -1 (standard error 0, 100 requests); the limit is 20% less",
            id="a negative mean, beyond",
        ),
        pytest.param(party(mean(9.0, 0.0), mean(1.0, 0.0), theta=1.0), None, id="more than enough"),
    ],
)
def test_a_party_that_gets_too_little_beyond_chance_is_a_breach(given, breach):
    assert judge_parties([given], 100, 0.2) == (None if breach is None else Breach(breach))


def test_parties_with_other_expressions_are_not_compared():
    table = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    changed = tiny.UTILITY.replace("2 * hide", "3 * hide").replace(
        "creator = 0.5 }", "creator = 0.5 }\nat_least = { creator = 0.25 }"
    )
    other = load_utility(changed.encode(), tiny.manifest())
    means = {"home": {"pinner": mean(1.0), "creator": mean(2.0)}}
    assert compared(means, means, other, table) == [
        PartyOfSurface("home", "pinner", mean(1.0), None, None),
        PartyOfSurface("home", "creator", mean(2.0), mean(2.0), 0.25),
    ]
    assert compared(means, {}, table, table)[0].default is None


# The pinner has another expression, so that only the creator is compared with the default label.
STARVING = tiny.UTILITY.replace("creator = 0.5 }", "creator = -9.0 }").replace("2 * hide", "3 * hide")
REASONS = {
    "loss": (STARVING, "against the default label's"),
    "theta": (STARVING.replace("-9.0 }", "-9.0 }\nat_least = { creator = 1.0 }"), "but at_least requires 1"),
}


@pytest.mark.parametrize("breach", REASONS)
async def test_a_canary_that_starves_a_party_is_rolled_back_with_party_surface_and_numbers(
    breach, serve, calls, store, tmp_path
):
    table, told = REASONS[breach]
    loss_max = 0.25 if breach == "loss" else 100.0
    server = await serve(guard=GuardConfig(requests_min=20, p99_ratio_max=1_000, party_loss_max=loss_max))
    call = calls(server)
    publish(store, tmp_path, 2, **own_golden(ALIKE), **{"utility.toml": table.encode()})
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server.status.by_label, 30)
    labels = {"party": "creator", "surface": "home"}
    assert sample(server, "pinrank_party_theta", **labels, label="canary") == (1.0 if breach == "theta" else 0)
    given = 0
    while store.labels("tiny")["canary"] == 2:
        for label in ("stable", "canary"):
            await call.rank(user=1 + given % 4, pins=range(1 + given % 5, 31), top_k=3, label=label)
        given += 1
        assert given < 5_000
        server.swap.newest.poll_now()
    entry = store.head("tiny")
    assert entry.why.startswith("rolled back from 2: the utility of creator on home is ")
    assert told in entry.why
    await eventually(lambda: held(server, 2) == "gone", 30)
    answers, total = (
        sample(server, f"pinrank_party_utility_{kind}", **labels, label="stable") for kind in ("count", "sum")
    )
    assert answers == given
    assert total > 0
