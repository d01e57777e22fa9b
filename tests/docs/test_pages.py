"""What pages say of the repository is true: links and paths lead somewhere, and ARCHITECTURE's picture is the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = sorted(path for path in TRACKED if path.endswith(".md"))
FOLDERS = {str(folder) for path in TRACKED for folder in PurePosixPath(path).parents}
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
#: A path from the repository's root, or from the page's own folder.
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")


def prose(page: str) -> str:
    return FENCED.sub("", (ROOT / page).read_text())


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_files_and_headings_that_exist(page: str) -> None:
    dead = []
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(str(path.relative_to(ROOT)))):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_source_files_that_a_page_names_exist(page: str) -> None:
    top = {folder.partition("/")[0] for folder in FOLDERS} - {"."}
    named = {path.rstrip("/") for path in PATH.findall(prose(page)) if path.partition("/")[0] in top}
    assert not {path for path in named if path not in TRACKED and path not in FOLDERS and "NAME" not in path}


@pytest.mark.parametrize("page", PAGES)
def test_source_files_that_a_page_names_without_a_folder_exist(page: str) -> None:
    names = {PurePosixPath(path).name for path in TRACKED}
    assert not set(re.findall(r"`(\w+\.(?:py|cpp|cu|sh|proto))`", prose(page))) - names - {"ort_engine.py"}


def rooms_named() -> list[str]:
    """The folders of ARCHITECTURE's tree: an indented one stands in the last one that is not."""
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## Folders and rooms")[2].partition("```\n")[2]
    found: list[str] = []
    top = ""
    for line in text.partition("\n```")[0].splitlines():
        for name in re.findall(r"(?:^ *|(?<=/)  )([\w/]+/)(?= |$)", line):
            top = top if line.startswith(" ") else name
            found.append((top + name if line.startswith(" ") else name).rstrip("/"))
    return found


def test_the_picture_of_the_architecture_is_the_tree() -> None:
    rooms = {str(PurePosixPath(path).parent) for path in TRACKED if path.endswith(".py")}
    rooms = {room for room in rooms if room != "." and not room.startswith("tests/")}
    named = rooms_named()
    assert len(named) == len(set(named))
    assert rooms <= set(named) <= FOLDERS


def test_no_room_holds_more_than_about_a_dozen_modules() -> None:
    modules = [PurePosixPath(path) for path in TRACKED if re.fullmatch(r"(?!tests/).*/(?!__init__)\w+\.py", path)]
    assert modules
    crowded = {str(path.parent) for path in modules if sum(other.parent == path.parent for other in modules) > 13}
    assert not crowded
