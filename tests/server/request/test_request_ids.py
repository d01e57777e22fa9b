from __future__ import annotations

from server.request.request_ids import RequestIds


def test_ids_of_one_process_differ_and_are_never_zero():
    ids = RequestIds()
    drawn = [ids.next() for _ in range(10_000)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 < one < 1 << 64 for one in drawn)


def test_a_process_that_draws_zeros_has_no_id_zero():
    ids = RequestIds(lambda _: 0)
    assert ids.next() == (1 << 40) + 1


def test_the_counter_wraps_within_its_bits():
    ids = RequestIds(lambda bits: (1 << bits) - 1)
    assert [ids.next(), ids.next()] == [0xFFFFFF << 40, (0xFFFFFF << 40) + 1]
