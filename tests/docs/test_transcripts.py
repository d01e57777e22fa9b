"""The transcripts in the pages are what the commands print today."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from docs import transcripts
from docs.markers import marked


def words(text: str) -> Counter[str]:
    """The words, wherever tables and wraps put them."""
    return Counter(re.sub("[^!-~]", " ", text).split())


@pytest.mark.parametrize("name", transcripts.STORIES)
def test_the_page_shows_what_the_commands_print(name: str) -> None:
    told = marked(transcripts.page_of(name).read_text(), f"transcript: {name}")
    played = f"```console\n{transcripts.shown(transcripts.STORIES[name][1]())}\n```"
    masked = transcripts.without_numbers if name == "closed loop" else transcripts.masked
    assert words(masked(played)) == words(masked(told)), f"write it anew: python -m docs.transcripts --write\n{played}"


def test_only_what_differs_from_run_to_run_is_masked() -> None:
    told = "ml1m@8: golden row 3, head 'like': expected probability 0.117, got 0.179 (tolerance 0.001)"
    assert transcripts.masked(told) == (
        "ml1m@8: golden row N, head NAME: expected probability N, got N (tolerance 0.001)"
    )
    assert transcripts.masked("stable: 7 -> 9\nexit 1") == "stable: 7 -> 9\nexit 1"


def test_the_floats_of_another_processor_are_masked_with_the_order_that_they_give() -> None:
    here, there = "utilities: 3 with 0.0816, 4 with 0.0029", "utilities: 4 with 0.0797, 3 with 0.0027"
    assert words(transcripts.masked(here)) == words(transcripts.masked(there))
    assert words(transcripts.masked(here)) != words(transcripts.masked(there.replace("3 with", "5 with")))


def test_a_number_is_masked_however_small_it_is() -> None:
    assert transcripts.without_numbers("+1.2 [-6.62e-05, +0.1]") == transcripts.without_numbers("-3 [-0.0002, +4e-06]")
