from __future__ import annotations

import numpy as np

from tests import tiny


def test_a_part_has_the_chosen_candidates_the_newest_actions_and_the_query():
    whole = tiny.fetched([1, 2, 3, 4], [11, 12, 13], query=21)
    part = whole.part(np.array([3, 0]), 2)
    same = tiny.fetched([4, 1], [11, 12], query=21)
    np.testing.assert_array_equal(part.pins["pin_core"].rows, same.pins["pin_core"].rows)
    np.testing.assert_array_equal(part.events["pin_id"], [11, 12])
    assert (part.candidates, part.has_query_pin) == (2, True)
    assert part.query_row("pin_core") == same.query_row("pin_core")


def test_a_part_with_more_actions_than_there_are_has_them_all():
    whole = tiny.fetched([1, 2], [11, 12])
    part = whole.part(np.arange(2), 9)
    np.testing.assert_array_equal(part.pins["pin_core"].rows, whole.pins["pin_core"].rows)
    np.testing.assert_array_equal(part.pins["pin_core"].states, whole.pins["pin_core"].states)
    assert len(part.events) == 2
