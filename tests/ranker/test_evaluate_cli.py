from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranker.commands import run


def test_evaluate_needs_a_label_or_a_version(tmp_path: Path) -> None:
    (tmp_path / "models" / "toy" / "versions").mkdir(parents=True)
    code, output = run("evaluate", "--store", tmp_path / "models", "--model", "toy", "--data", tmp_path)
    assert code == 1
    assert "model 'toy' has no labels yet; choose a version with --version" in output
    code, output = run("evaluate", "--store", tmp_path / "models", "--engine", "abacus", "--data", tmp_path)
    assert code == 1
    assert "unknown engine 'abacus'" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate; add --store DIR, --bundle DIR or both"),
        (["--bundle", "a", "--version", "1"], "--version and --label require --store DIR"),
        (["--bundle", "lost"], "lost/manifest.json: No such file or directory"),
        (["--bundle", "lost", "--json", "."], ". is a folder; choose a file name in it"),
        (["--bundle", "lost", "--json", "/proc/e.json"], "cannot write to /proc: "),
        (
            ["--bundle", "lost", "--report", "no/such/report.html"],
            "cannot write report.html: the folder no/such does not exist; create it first",
        ),
    ],
)
def test_evaluate_refuses_what_cannot_work_and_says_why(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run("evaluate", "--data", ".", *arguments)
    assert code == 1
    assert f"error: {message}" in output


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tiny.write_tiny_bundle(tmp_path / folder / "same")
    code, output = run("evaluate", "--bundle", tmp_path / "a" / "same", "--bundle", tmp_path / "b" / "same")
    assert code == 1
    assert "two bundles have the name 'same'; rename one of the folders" in output


def test_a_report_without_matplotlib_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("ranker.evaluation.charts", "ranker.evaluation.report"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    code, output = run("evaluate", "--bundle", tmp_path / "lost", "--report", tmp_path / "report.html")
    assert code == 1
    assert "error: this command needs matplotlib, which is not installed: pip install 'pinrank[train]'" in output
