from __future__ import annotations

import re

import numpy as np

from loadtest.html import report_html
from loadtest.open_loop import OK, STAGES, Samples
from loadtest.report import summarise


def step(rate, refused=0, late_ms=0.0):
    rng = np.random.default_rng(rate)
    statuses = (OK,) * (rate - refused) + ("RESOURCE_EXHAUSTED",) * refused
    stages = rng.integers(1, 2_000, (rate, len(STAGES)), dtype=np.uint32)
    samples = Samples(
        np.arange(rate) / rate, np.full(rate, late_ms / 1e3), rng.lognormal(-5, 0.5, rate), statuses, stages,
        (("pins_trimmed",),) + ((),) * (rate - 1), ("tiny<1>@1",), 0.3,
    )  # fmt: skip
    return summarise(samples, 1.0, 10.0), samples


def test_the_report_is_one_file_with_every_step_and_three_pictures_and_nothing_from_outside():
    page = report_html("Load on <server>", {"rate": "a & b"}, [step(100), step(50), step(200, refused=60)], None)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "Load on &lt;server&gt;" in page
    assert "a &amp; b" in page
    assert "tiny&lt;1&gt;@1" in page
    assert "RESOURCE_EXHAUSTED" in page
    assert "degraded: pins_trimmed" in page
    assert "was late in" not in page


def test_a_generator_that_was_the_bottleneck_is_named():
    assert "was late in 1 of 2 steps" in report_html("t", {}, [step(100), step(200, late_ms=5)], None)


def test_a_search_leads_with_what_it_found():
    assert "with 99% goodput within 10 ms is 123.4 requests/s" in report_html("t", {}, [step(100)], 123.4)


def test_a_run_without_any_answer_still_has_a_report():
    summary, samples = step(20, refused=20)
    assert summary.latency_ms is None
    assert "RESOURCE_EXHAUSTED" in report_html("t", {}, [(summary, samples)], 0.0)
