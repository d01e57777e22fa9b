"""Parts of pages that scripts write: each stands between a marker of its own and `<!-- end -->`."""

from __future__ import annotations

_END = "\n<!-- end -->"


def marked(page: str, marker: str) -> str:
    """Return the part of a page that stands under a marker. Raises ValueError where the page has no such marker."""
    return _parts(page, marker)[1]


def with_marked(page: str, marker: str, text: str) -> str:
    """Return the page with other text under a marker. Raises ValueError where the page has no such marker."""
    before, _, after = _parts(page, marker)
    return f"{before}{text}{after}"


def _parts(page: str, marker: str) -> tuple[str, str, str]:
    start = f"<!-- {marker} -->\n"
    before, found, rest = page.partition(start)
    text, ended, after = rest.partition(_END)
    if not found or not ended:
        raise ValueError(f"the page has no part between {start.strip()!r} and {_END.strip()!r}")
    return before + start, text, _END + after
