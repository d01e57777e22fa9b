from __future__ import annotations

import numpy as np
import pytest

from ranker.training.time_window import draw_windows_s, hidden_share, hide_newest

INF = np.inf
#: Newest first; three actions, a full sequence, none at all.
ACTIONS = np.array([[3, 1, 2, 0], [4, 3, 2, 1], [0, 0, 0, 0]])
AGES_S = np.array([[10, 20, 30, INF], [5, 5, 50, 500], [INF] * 4], np.float32)
EMBEDDINGS = (ACTIONS[:, :, None] * np.array([1.0, -1.0])).astype(np.float32)


@pytest.mark.parametrize(
    ("windows_s", "left"),
    [
        ([0, 0, 0], ACTIONS.tolist()),
        pytest.param([10, 5, 9], ACTIONS.tolist(), id="an action as old as the window stays"),
        ([15, 6, 1e9], [[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]]),
        ([30, 100, 0], [[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        ([31, 501, 1], np.zeros((3, 4), int).tolist()),
    ],
)
def test_actions_younger_than_the_window_go_and_the_rest_moves_up_in_order(
    windows_s: list[float], left: list[list[int]]
) -> None:
    actions, embeddings = hide_newest(ACTIONS, EMBEDDINGS, AGES_S, np.array(windows_s, float))
    assert actions.tolist() == left
    assert (actions.dtype, embeddings.dtype) == (ACTIONS.dtype, EMBEDDINGS.dtype)
    np.testing.assert_array_equal(embeddings, np.array(left)[:, :, None] * np.array([1.0, -1.0]))


def test_its_arguments_stay_as_they_are() -> None:
    actions, embeddings = ACTIONS.copy(), EMBEDDINGS.copy()
    hide_newest(actions, embeddings, AGES_S, np.full(3, 25.0))
    np.testing.assert_array_equal(actions, ACTIONS)
    np.testing.assert_array_equal(embeddings, EMBEDDINGS)


def test_no_requests_and_no_places_are_fine() -> None:
    none = hide_newest(ACTIONS[:0], EMBEDDINGS[:0], AGES_S[:0], np.zeros(0))
    assert [array.shape for array in none] == [(0, 4), (0, 4, 2)]
    short = hide_newest(ACTIONS[:, :0], EMBEDDINGS[:, :0], AGES_S[:, :0], np.ones(3))
    assert [array.shape for array in short] == [(3, 0), (3, 0, 2)]


def test_windows_are_uniform_up_to_the_most_and_given_to_their_share() -> None:
    windows_s = draw_windows_s(np.random.default_rng(1), 40_000, hours_max=2.0, share=0.25)
    given = windows_s[windows_s > 0]
    assert len(given) / 40_000 == pytest.approx(0.25, abs=0.01)
    assert given.max() <= 7_200
    np.testing.assert_allclose(np.quantile(given, [0.25, 0.5, 0.75]), [1_800, 3_600, 5_400], rtol=0.05)


def test_the_hidden_share_is_what_windows_hide_on_average() -> None:
    rng = np.random.default_rng(2)
    ages_s = np.sort(rng.exponential(4_000, (20_000, 6)).astype(np.float32), axis=1)
    ages_s[:, 4:] = INF
    actions = np.isfinite(ages_s).astype(np.int64)
    windows_s = draw_windows_s(rng, len(ages_s), hours_max=1.5, share=0.8)
    kept, _ = hide_newest(actions, np.zeros((*actions.shape, 1), np.float32), ages_s, windows_s)
    assert hidden_share(ages_s, 1.5, 0.8) == pytest.approx(1 - kept.sum() / actions.sum(), abs=0.01)
    assert hidden_share(ages_s, 0.0, 1.0) == 0
    assert hidden_share(np.full((2, 3), INF), 24.0, 1.0) == 0
