"""Whether two fetches found the same."""

from __future__ import annotations

from dataclasses import astuple

from feature_client.codec import RowState


def assert_same(found, expected):
    assert found.missing() == expected.missing()
    present = found.sequence_state == RowState.PRESENT and not any(astuple(found.missing()))
    assert found.complete == expected.complete == present
    assert found.events.tobytes() == expected.events.tobytes()
    assert (found.candidates, found.has_query_pin, found.sequence_state, found.stale_rows, found.future_events) == (
        expected.candidates, expected.has_query_pin, expected.sequence_state, expected.stale_rows,
        expected.future_events,
    )  # fmt: skip
    for rows, others in ((found.user, expected.user), (found.pins, expected.pins)):
        assert rows.keys() == others.keys()
        for name in rows:
            assert rows[name].rows.tobytes() == others[name].rows.tobytes()
            assert rows[name].states.tolist() == others[name].states.tolist()
