"""The stories that docs/models.md tells are what the commands say today."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from docs import transcripts


def words(text: str) -> Counter[str]:
    """The words, wherever tables and wraps put them."""
    return Counter(re.sub("[^!-~]", " ", text).split())


@pytest.mark.parametrize("name", transcripts.STORIES)
def test_the_page_tells_what_happens(name: str) -> None:
    page = transcripts.PAGE.read_text()
    told = page.partition(f"<!-- transcript: {name} -->\n```console\n")[2].partition("\n```\n<!-- end -->")[0]
    played = transcripts.written(transcripts.STORIES[name]())
    assert words(played) == words(told), f"tell it anew: python -m docs.transcripts --write\n{played}"
