"""A server whose canary gives a party too little."""

from __future__ import annotations

import pytest

from server.config_sections import GuardConfig
from server.rollout.guard import Healthy
from tests import tiny
from tests.conftest import eventually
from tests.server.swapping import ALIKE, held, own_golden, publish, sample

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
    assert sample(server, "pinrank_party_answers_total", **labels, label="stable") == given
    gained, lost = (
        sample(server, "pinrank_party_utility_total", **labels, label="stable", kind=kind)
        for kind in ("gained", "lost")
    )
    assert gained > 0
    assert lost == 0  # this party's utility is a probability times an attribute
    squares = sample(server, "pinrank_party_utility_squares_total", **labels, label="stable")
    assert squares >= gained**2 / given


async def test_the_status_of_a_healthy_canary_says_what_its_parties_get_and_must_get(serve, calls, store, tmp_path):
    table = tiny.UTILITY.replace("creator = 0.5 }", "creator = 0.5 }\nat_least = { creator = 0.01 }")
    server = await serve(guard=GuardConfig(requests_min=20, p99_ratio_max=1_000, party_loss_max=100.0))
    call = calls(server)
    publish(store, tmp_path, 2, **own_golden(ALIKE), **{"utility.toml": table.encode()})
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server.status.by_label, 30)
    for label in ("stable", "canary") * 25:
        await call.rank(user=1, pins=range(1, 31), top_k=3, label=label)
    await eventually(lambda: isinstance(server.status.verdicts.get("canary"), Healthy), 30)
    gained = sample(
        server, "pinrank_party_utility_total", party="creator", surface="home", label="canary", kind="gained"
    )
    note = server.status.verdicts["canary"].note
    assert note.endswith(f", creator on home {gained / 25:.4g} (at least 0.01)")
