"""Rules for Prometheus, in deploy/, on pages and in what `pinrank tune` prints: promtool reads and tests them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from docs import tables
from ranker.tuning.tables import alert_expression

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "alerts"
RULES = ALERTS / "parties.yml"
TESTS = ALERTS / "parties_tests.yml"

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


def expression(rules: str) -> str:
    """Return the expression of the only rule, on one line."""
    (found,) = re.findall(r"^ +expr: \|\n(.*?)^ +for:", rules, re.MULTILINE | re.DOTALL)
    return " ".join(found.split())


@needs_promtool
def test_every_file_of_rules_is_valid():
    files = [path for path in ALERTS.glob("*.yml") if path != TESTS]
    assert RULES in files
    assert "1 rules found" in promtool("check", "rules", *files)


@needs_promtool
def test_the_alert_fires_below_the_theta_and_neither_above_it_nor_without_traffic():
    assert "FAILED" not in promtool("test", "rules", TESTS)


@needs_promtool
def test_what_tune_prints_is_a_valid_expression(tmp_path):
    printed = alert_expression('{surface="home",party=~"creator|merchant"}')
    rule = {"alert": "PinrankPartyBelowTheta", "expr": printed}
    (tmp_path / "printed.yml").write_text(json.dumps({"groups": [{"name": "printed", "rules": [rule]}]}))
    assert "1 rules found" in promtool("check", "rules", tmp_path / "printed.yml")


def test_the_page_the_file_its_tests_and_tune_have_the_same_rule():
    rule = RULES.read_text()
    assert rules_on_pages() == {"exploration.md": rule[rule.index("groups:") :]}
    assert expression(rule) == alert_expression()
    (mean,) = re.findall(r"expr: &mean (.*)", TESTS.read_text())
    assert alert_expression().startswith(f"{mean} < ")


def test_the_rule_reads_metrics_that_servers_have():
    known = {one.name for one in tables.metrics()}
    read = {re.sub(r"_(sum|count)$", "", name) for name in re.findall(r"pinrank_\w+", expression(RULES.read_text()))}
    assert read == {"pinrank_party_utility", "pinrank_party_theta"}
    assert read <= known
