"""The stories that docs/models.md tells are what the commands say today."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import transcripts  # noqa: E402


def words(text: str) -> Counter[str]:
    """The words, wherever tables and wraps put them."""
    return Counter(re.sub("[^!-~]", " ", text).split())


@pytest.mark.parametrize("name", transcripts.STORIES)
def test_the_page_tells_what_happens(name: str) -> None:
    page = transcripts.PAGE.read_text()
    told = page.partition(f"<!-- transcript: {name} -->\n```console\n")[2].partition("\n```\n<!-- end -->")[0]
    played = transcripts.written(transcripts.STORIES[name]())
    assert words(played) == words(told), f"tell it anew: python docs/transcripts.py --write\n{played}"
