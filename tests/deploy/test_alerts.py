"""Rules for Prometheus, in deploy/ and on pages: promtool reads and tests them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from docs import tables
from ranker.tuning.tables import alert_lines

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "alerts"
RULES = ALERTS / "parties.yml"
TESTS = sorted(ALERTS.glob("*_tests.yml"))

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def rules_on_pages() -> dict[str, str]:
    """Return the blocks of rules on pages, by page."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {
        page.name: block
        for page in pages
        for block in re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        if block.startswith("groups:")
    }


@needs_promtool
def test_every_file_of_rules_is_valid():
    files = [path for path in ALERTS.glob("*.yml") if path not in TESTS]
    assert RULES in files
    assert promtool("check", "rules", *files).count("4 rules found") == len(files) == len(TESTS)


@needs_promtool
@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_otherwise(tests):
    assert "FAILED" not in promtool("test", "rules", tests)


def test_the_page_has_the_rules_of_the_file():
    rules = RULES.read_text()
    assert rules_on_pages() == {"exploration.md": rules[rules.index("groups:") :]}


def test_the_rules_read_metrics_that_servers_have():
    known = {one.name for one in tables.metrics()}
    for rules in set(ALERTS.glob("*.yml")) - set(TESTS):
        read = set(re.findall(r"\bpinrank_\w+", rules.read_text()))
        assert read
        assert read <= known


def test_tune_names_the_alert_that_the_file_defines():
    named = next(alert_lines(SimpleNamespace(thetas={"creator": 1.0, "ad": 0.1}), "home"))
    (alert,) = re.findall(r"alert: (\w+)", RULES.read_text())
    assert f"alert {alert} ({RULES.relative_to(ROOT)})" in named
    assert "creator or ad gets less" in named
