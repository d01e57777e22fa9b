"""Check that every set of pinrank's extras can be installed from the package index, by its metadata alone.

python -m deploy.install.resolve

uv resolves each set for each Python. pip resolves all extras together on every Python installed here; the versions that
it finds satisfy each subset too, because all sets obey the same constraints. Both use only the index: no local wheels,
no other indexes, no installed packages. Neither downloads a package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
#: The settings of pip that lead to the index. A machine's other settings must not change the result.
INDEX_SETTINGS = ("index-url", "cert", "client-cert", "proxy", "trusted-host", "timeout")
TIMEOUT_S = 600
#: To learn the requirements of this package's libraries, pip runs their build scripts, which download gigabytes from
#: NVIDIA's index. uv reads the published metadata.
NOT_WITH_PIP = "tensorrt"
# Even with --dry-run, pip downloads the packages that it resolved, so this script stops it after resolving.
PIP_RESOLVE = """
import json, os, sys
from pip._internal.operations.prepare import RequirementPreparer
if not callable(getattr(RequirementPreparer, "prepare_linked_requirements_more", None)):
    sys.exit("deploy/install/resolve.py does not support this pip: it has no prepare_linked_requirements_more")
def report(self, requirements, **_):
    with open(sys.argv[1], "w") as file:
        json.dump([requirement.link.url for requirement in requirements], file)
    os._exit(0)
RequirementPreparer.prepare_linked_requirements_more = report
from pip._internal.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True, slots=True)
class Resolution:
    what: str
    packages: int
    failure: str = ""


class NoIndexError(Exception):
    """The package index cannot be reached, so nothing was checked."""


def main() -> int:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment, index = clean_environment()
    with tempfile.TemporaryDirectory() as folder:
        try:
            reach(environment, index, Path(folder))
        except NoIndexError as error:
            print(f"NOT CHECKED: the package index cannot be reached: {error}", file=sys.stderr)
            return 1
        jobs = [
            *((with_uv, name, wanted, python) for python in PYTHONS for name, wanted in sets(extras)),
            *((with_pip, *list(sets(extras))[-1], python) for python in PYTHONS),
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outcomes = []
            for outcome in pool.map(lambda job: job[0](*job[1:], environment, index, Path(folder)), jobs):
                verdict = (
                    f"FAILED\n{outcome.failure}" if outcome.failure else f"resolves to {outcome.packages} packages"
                )
                print(f"{outcome.what:<40} {verdict}", flush=True)
                outcomes.append(outcome)
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} sets of extras resolve from published metadata")
    print(f"not checked with pip: {NOT_WITH_PIP}, whose libraries come from NVIDIA's index (docs/install.md)")
    return int(failed > 0)


def sets(project: dict[str, object]) -> Iterator[tuple[str, list[str]]]:
    """Yield each set's name and requirements: no extra, each extra, and last all extras together."""
    dependencies, extras = project["dependencies"], project["optional-dependencies"]
    assert isinstance(dependencies, list) and isinstance(extras, dict)  # noqa: S101, PT018 - they come from our pyproject.toml
    yield "no extra", dependencies
    for name in extras:
        yield name, [*dependencies, *expanded(name, extras)]
    yield "all extras", [*dependencies, *(requirement for name in extras for requirement in expanded(name, extras))]


def expanded(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of an extra, with `pinrank[...]` replaced by the requirements of those extras."""
    found = []
    for line in extras[extra]:
        requirement = Requirement(line)
        own = requirement.name == "pinrank"
        found += [r for name in sorted(requirement.extras) for r in expanded(name, extras)] if own else [line]
    return found


def clean_environment() -> tuple[dict[str, str], str | None]:
    """Return an environment with no package source but the index, and the index's URL if one is configured."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    # Such as `global.index-url='https://...'`. Settings from the environment (`:env:`) come last and win, as in pip.
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
    index_settings = {
        f"PIP_{name.upper().replace('-', '_')}": settings[name] for name in INDEX_SETTINGS if name in settings
    }
    return kept | index_settings | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}, settings.get(
        "index-url"
    )


def reach(environment: dict[str, str], index: str | None, folder: Path) -> None:
    outcome = with_uv("the index", ["packaging"], PYTHONS[0], environment, index, folder)
    if outcome.failure:
        raise NoIndexError(outcome.failure)


def with_uv(
    name: str, wanted: Sequence[str], python: str, environment: dict[str, str], index: str | None, folder: Path
) -> Resolution:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    given, found = folder / f"uv-{python}-{name}.in", folder / f"uv-{python}-{name}.txt"
    given.write_text("\n".join(wanted))
    command = [
        uv, "pip", "compile", "--quiet", "--no-config", "--no-sources", "--no-python-downloads",
        "--python", sys.executable, "--python-version", python,
        "--constraints", str(CONSTRAINTS), "--no-annotate", "--no-header", "--output-file", str(found), str(given),
        *(["--default-index", index] if index else []),
    ]  # fmt: skip
    failure = run(command, environment)
    packages = 0 if failure else len(found.read_text().splitlines())
    return Resolution(f"uv, Python {python}, {name}", packages, failure)


def with_pip(
    name: str, wanted: Sequence[str], python: str, environment: dict[str, str], _: str | None, folder: Path
) -> Resolution:
    what = f"pip, Python {python}, {name}"
    if (interpreter := interpreter_of(python)) is None:
        return Resolution(what, 0, f"Python {python} with pip is not installed here; install it, or add it with pyenv")
    report = folder / f"pip-{python}.json"
    command = [
        interpreter, "-c", PIP_RESOLVE, str(report), "install", "--dry-run", "--ignore-installed",
        "--use-feature=fast-deps", "--constraint", str(CONSTRAINTS),
        *(line for line in wanted if Requirement(line).name != NOT_WITH_PIP),
    ]  # fmt: skip
    # pip is stopped before it can remove its temporary files, so they go into a folder that is removed.
    if failure := run(command, environment | {"TMPDIR": str(folder)}):
        return Resolution(what, 0, failure)
    found = json.loads(report.read_text())
    local = [url for url in found if url.startswith("file:")]
    return Resolution(what, len(found), f"these come from this machine, not from the index: {local}" if local else "")


def interpreter_of(python: str) -> str | None:
    """Return an interpreter of this version that has pip: the current one, one of pyenv's, or one on the PATH."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(map(str, pyenv.glob(f"{python}.*/bin/python"))), shutil.which(f"python{python}")]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run a command; return its output if it failed, else an empty string."""
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed; it comes with the extra `dev`"
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} s"
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}".strip()[-4000:]


if __name__ == "__main__":
    sys.exit(main())
