from __future__ import annotations

import pytest

from server.access.callers import EVERYTHING_BUT_MODELS, Anonymous, origin


@pytest.mark.parametrize(
    ("peer", "found"),
    [
        ("ipv4:10.0.0.7:40000", "10.0.0.7"),
        ("ipv4:10.0.0.7:40001", "10.0.0.7"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:40000", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:40001", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:10.0.0.7]:40000", "10.0.0.7"),
        ("ipv6:[fe80::1%eth0]:40000", "fe80::/64"),
        ("ipv4:127.0.0.1:40000", "ipv4:127.0.0.1:40000"),
        ("ipv6:[::1]:40000", "ipv6:[::1]:40000"),
        ("unix:", "unix:"),
        ("ipv4:what:ever", "ipv4:what:ever"),
        ("", ""),
    ],
)
def test_calls_without_an_identity_count_by_the_machine_that_they_come_from(peer, found):
    assert origin(peer) == found


def test_connections_of_a_machine_are_one_flow_and_share_quotas_with_all_others():
    anonymous = Anonymous(EVERYTHING_BUT_MODELS)
    first, second = (anonymous.from_peer(f"ipv4:10.0.0.7:{port}") for port in (40_000, 40_001))
    assert first is second
    others = {anonymous.from_peer(f"ipv4:10.0.{i}.1:1").flow for i in range(200)}
    assert 32 < len(others) <= 64
