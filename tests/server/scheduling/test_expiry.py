from __future__ import annotations

import pytest

from server.scheduling.contract import Expire, Idle, Run
from tests.server.scheduling.policies import drain, exactly, policy, ticket


def test_expired_tickets_come_back_before_anything_runs():
    chosen = policy()
    early, late = ticket(0, 1.0), ticket(1, 5.0)
    chosen.offer(early, 0.0)
    chosen.offer(late, 0.0)
    assert chosen.next(1.0) == Expire((early,))
    assert drain(chosen, 1.0) == [[(1, 128)]]


def test_what_would_end_late_expires_before_it_costs_the_others_their_time():
    chosen = policy()
    hopeless, fine = ticket(0, 0.003), ticket(1, 1.0)
    chosen.offer(hopeless, 0.0)
    chosen.offer(fine, 0.0)
    assert chosen.next(0.0) == Expire((hopeless,))
    assert drain(chosen) == [[(1, 128)]]


def test_alone_a_ticket_is_tried_until_its_deadline_whatever_the_prediction():
    chosen = policy()
    chosen.offer(ticket(0, 0.001), 0.0)
    assert isinstance(chosen.next(0.0005), Run)


@pytest.mark.parametrize(
    ("deadline_s", "expires"),
    [
        pytest.param(6.9, True, id="late on the one stream that it may take"),
        pytest.param(7.0, False, id="just in time"),
    ],
)
def test_a_ticket_expires_beside_others_when_it_cannot_end_in_time(deadline_s, expires):
    chosen = exactly(streams=2)
    for one in (ticket(0, deadline_s), ticket(1, 99.0)):
        chosen.offer(one, 5.0)
    assert (chosen.next(5.0) == Expire((ticket(0, deadline_s),))) is expires


def test_several_tickets_without_hope_expire_together_and_the_last_one_is_tried():
    chosen = exactly()
    for number in range(3):
        chosen.offer(ticket(number, 5.1), 5.0)
    assert chosen.next(5.0) == Expire((ticket(0, 5.1), ticket(1, 5.1)))
    assert chosen.next(5.0).pieces[0].ticket == ticket(2, 5.1)


def test_a_ticket_expires_at_its_deadline_exactly():
    chosen = exactly()
    chosen.offer(ticket(0, 6.0), 5.0)
    chosen.reserve(ticket(1, 6.0), 5.0)  # nobody waits for what is not ready yet: its deadline is watched elsewhere
    assert chosen.next(6.0) == Expire((ticket(0, 6.0),))
    assert chosen.next(6.0) == Idle()
