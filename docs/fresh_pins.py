"""The story of new pins in docs/embeddings.md: from new actions to the next answer, with the ranker untouched.

Users listen to songs of one kind each. The ranker and the network of pins are trained on them. Then a song comes out
that nobody knew, and three users of one kind listen to it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from docs.story import PINRANK, Story, serving

LISTENERS, SONGS, KINDS, NEW = 150, 90, 3, 1_001
#: 1 January 2026, in seconds.
START_S = 1_767_225_600
#: What a listener who likes songs of the first kind is offered: one of each kind, and the new one.
_ASKING, _OFFERED = 30, (3, 4, 5, NEW)
_UTILITY = """
[surfaces.home]
weights = { pinner = 1.0 }
utilities = { pinner = "closeup" }
[surfaces.related]
weights = { pinner = 1.0 }
utilities = { pinner = "closeup" }
"""
_SERVER = """
model_store = "models"
model = "songs"
feature_store = "lmdb://{folder}/features"
near_cache_bytes = 0
"""
_FILL = ("data", "fill", "songs", "--store", "models", "--model", "songs", "--feature-store")


def fresh_pins() -> list[str]:
    """Play the story."""
    with tempfile.TemporaryDirectory(prefix="pinrank-story-") as temporary:
        folder = Path(temporary)
        _write_songs(folder / "songs")
        (folder / "utility.toml").write_text(_UTILITY)
        (folder / "pinrank.toml").write_text(_SERVER.format(folder=folder))
        before = Story(folder)
        _produce(before)
        with serving(folder) as story:
            story.lines = before.lines
            _follow(story)
        return before.lines


def _produce(story: Story) -> None:
    """Train the network of pins and a ranker, and fill the feature store."""
    story.say("Vectors and neighbours of the songs, of events before those that the ranker is trained on.")
    _run(story, "embed", "svd", "songs", "--out", "svd.parquet", "--before", "training")
    _run(story, "embed", "walks", "songs", "--out", "neighbours", "--before", "training")
    _run(story, "embed", "materialise", "neighbours", "--features", "svd.parquet", "--out", "neighbourhoods")
    story.say("The network of pins, and a ranker that reads its vectors.")
    _run(
        story, "embed", "pins", "neighbourhoods", "--graph", "neighbours", "--dim", "16", "--batch", "16",
        "--own-dropped", "0.5", "--patience", "20", "--out", "pins", hidden=("epoch", "training:", "vectors:"),
    )  # fmt: skip
    _run(
        story, "train", "--data", "songs", "--name", "songs", "--utility", "utility.toml", "--variant", "base",
        "--epochs", "5", "--size", "hidden=32", "--requests-max", "800", "--pin-vectors", "pins/network.npz",
        "--out", "bundle", hidden=("",),
    )  # fmt: skip
    _run(story, "model", "publish", "bundle", "--label", "stable", hidden=("",))
    _run(story, *_FILL, f"lmdb://{story.folder}/features", "--pin-vectors", "pins/network.npz")


def _follow(story: Story) -> None:
    """Let a song come out, and let the server know it."""
    story.say("The server runs. A song comes out, of which it knows nothing.")
    unknown = _rank(story)
    story.say("Three users who like what user 30 likes listen to it.")
    with (story.folder / "songs" / "songs.inter").open("a") as file:
        file.writelines(f"{user}\t{NEW}\t{START_S + 200_000 + user}\n" for user in (0, 3, 6))
    _run(story, "embed", "walks", "songs", "--out", "neighbours-2")
    _run(story, "embed", "fold", "songs", "--vectors", "svd.parquet", "--out", "svd-2.parquet")
    _run(story, "embed", "materialise", "neighbours-2", "--features", "svd-2.parquet", "--out", "neighbourhoods-2")
    _run(
        story, "embed", "pins", "neighbourhoods-2", "--graph", "neighbours-2", "--network", "pins/network.npz",
        "--out", "pins-2",
    )  # fmt: skip
    _run(
        story, "embed", "align", "pins-2/co-save.parquet", "--to", "pins/co-save.parquet", "--out", "refreshed.parquet",
    )  # fmt: skip
    _run(story, *_FILL, f"lmdb://{story.folder}/features", "--pin-vectors", "refreshed.parquet")
    known = _rank(story)
    # Its place may stay: a song of which nothing is known may already be before those of other kinds.
    assert known[NEW] > unknown[NEW], f"the new song is not worth more: {unknown}, {known}"  # noqa: S101
    story.say("The same without files in between, again every ten minutes: pinrank embed follow")
    _run(
        story, "embed", "follow", "songs", "--network", "pins/network.npz", "--store", "models", "--model",
        "songs@stable", "--feature-store", f"lmdb://{story.folder}/features", "--once",
    )  # fmt: skip


def _run(story: Story, *arguments: str, hidden: tuple[str, ...] = ("warning",)) -> None:
    """Run a command, which must succeed; leave out the lines of its output that begin with `hidden`."""
    first = len(story.lines)
    story.run(*arguments)
    if any(line.startswith("(exit") for line in story.lines[first:]):
        raise RuntimeError("\n".join(story.lines))
    story.lines[first + 1 :] = [line for line in story.lines[first + 1 :] if not line.startswith(hidden)]


def _rank(story: Story) -> dict[int, float]:
    """Ask the server, show the order, and return the utility of each song."""
    arguments = ("rank", "--user", str(_ASKING), "--pins", ",".join(map(str, _OFFERED)), "--json")
    done = subprocess.run(
        [PINRANK, *arguments, "--address", story.address], capture_output=True, text=True, check=True, timeout=60
    )
    answer = json.loads(done.stdout)
    utilities = {int(pin): float(utility) for pin, utility in zip(answer["pin_ids"], answer["utilities"], strict=True)}
    shown = ", ".join(f"{pin} with {utility:.4f}" for pin, utility in utilities.items())
    story.lines += [f"$ pinrank {' '.join(arguments)}", f"  ... the order, and utilities: {shown} ..."]
    return utilities


def _write_songs(folder: Path) -> None:
    """Write who listened to which song, and when: 18 songs of the user's kind, and 2 of any."""
    rng = np.random.default_rng(3)
    rows = []
    for user in range(LISTENERS):
        own = np.arange(user % KINDS, SONGS, KINDS)
        songs = rng.permutation(np.unique([*rng.choice(own, 18, replace=False), *rng.choice(SONGS, 2, replace=False)]))
        rows += [(START_S + 997 * step + 61 * user, user, int(song)) for step, song in enumerate(songs)]
    folder.mkdir()
    lines = [f"{user}\t{song}\t{time_s}" for time_s, user, song in sorted(rows)]
    (folder / "songs.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n")
