from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ranker.evaluation.caveats import limits
from ranker.evaluation.report import report_html, write_report
from ranker.evaluation.results import Evaluation
from tests.ranker.scored import HEADS, measured, scored_test


class Page(HTMLParser):
    """What a page consists of; its tags must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.images: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in {"img", "meta"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        return measured(scored_test(), tmp_path_factory.mktemp("data"), patch)


@pytest.fixture(scope="module")
def html(evaluation: Evaluation) -> str:
    return report_html(evaluation)


def test_the_report_holds_everything_it_shows(html: str) -> None:
    page = Page(html)
    assert not re.search(r"https?:|//", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert not page.tags & {"script", "link", "iframe", "object", "a"}
    assert len(page.images) == 3
    for source in page.images:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        picture = ET.fromstring(base64.b64decode(content))
        links = [v for node in picture.iter() for name, v in node.attrib.items() if name.endswith("href")]
        assert links
        assert all(link.startswith("#") for link in links)


def test_the_report_says_what_was_measured_and_what_that_cannot_show(html: str, evaluation: Evaluation) -> None:
    text = " ".join(Page(html).text.split())
    for expected in (*HEADS, "good", "bad", "popularity", "toy data", "cold", "light", "heavy", "Seed", "40 requests"):
        assert expected in text
    assert "What this data cannot show" in text
    for sentence in limits(evaluation):
        assert " ".join(sentence.split()) in text


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = scored_test()
    named = replace(test, by_bundle={"<b>&": test.by_bundle["good"], "other": test.by_bundle["bad"]})
    html = report_html(measured(named, tmp_path, monkeypatch))
    assert "<b>&<" not in html
    assert "<b>&" in Page(html).text


def test_a_report_of_a_single_head_without_positives_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = scored_test()
    nothing = replace(test, labels=test.labels * 0)
    path = tmp_path / "report.html"
    write_report(measured(nothing, tmp_path / "data", monkeypatch, resamples=0), path)
    page = Page(path.read_text())
    assert "Nothing to draw" in page.text
    assert "No intervals were computed" in page.text


def test_the_same_evaluation_makes_the_same_report(html: str, evaluation: Evaluation) -> None:
    assert report_html(evaluation) == html
