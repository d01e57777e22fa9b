from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from feature_client.stores.redis.slots import slots_of


@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"{a}b", b"x{}y", b"{", b"a{b}{c}", b"}{a}"]))))
def test_slots_are_those_of_redis_for_any_keys_also_such_with_hash_tags(keys):
    assert slots_of(keys).tolist() == [key_slot(key) for key in keys]


def test_the_specifications_own_example():
    assert slots_of([b"123456789"]).tolist() == [0x31C3 % 16384]


def test_every_byte_has_its_slot():
    keys = [bytes([value]) for value in range(256)]
    assert slots_of(keys).tolist() == [key_slot(key) for key in keys]
