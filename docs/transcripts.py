"""Play the stories of the pages with the real commands, a real server and real requests.

    python -m docs.transcripts            prints the transcripts
    python -m docs.transcripts --write    puts them into their pages, between their markers

The page shows what the commands printed. A test plays the stories again and compares; only for this comparison, what
differs from run to run (times, digests, measured values) is masked.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import numpy as np

from docs.changed_bundles import made, scaled_logits, with_moved_embeddings
from docs.closed_loop import closed_loop
from docs.fresh_pins import fresh_pins
from docs.markers import with_marked
from docs.story import PINS, phase, story_of
from feature_client.codec import decode_rows
from feature_client.groups import FeatureGroup
from feature_client.stores.open_store import open_store
from model_store.registry.entries import whoami
from model_store.registry.store import open_model_store

ROOT = Path(__file__).parents[1]


def bad_models() -> list[str]:
    """Publish three bad versions, each of which is caught at another stage."""
    with story_of() as (story, bundle):
        made(story.folder / "out" / "8", bundle, 8, scaled_logits(1.0, 0.5), honest=False)
        made(story.folder / "out" / "9", bundle, 9, scaled_logits(-1.0, 0.0))
        made(story.folder / "out" / "10", bundle, 10, scaled_logits(1.0, 3.0))
        story.requests(200)
        story.say("Version 8 does not reproduce its golden scores, so it cannot be published.")
        story.run("model", "publish", "out/8")
        story.say("Version 9 reproduces its golden scores but reverses the order of the candidates.")
        story.say("The server tries it on recent requests before it answers any.")
        story.run("model", "publish", "out/9", "--label", "stable", "--by", "ben", "--why", "new loss")
        story.wait(phase(9, "failed"))
        story.requests(20)
        story.run("model", "status")
        story.run("model", "rollback", "ml1m", "stable", "--by", "ben", "--why", "9 is upside down")
        story.wait(phase(9, "gone"))
        story.say("Version 10 orders well, but its probabilities are far too high. As a canary it gets 20% of users.")
        story.run("model", "publish", "out/10", "--label", "canary", "--by", "ben", "--why", "more epochs")
        story.run("model", "traffic", "ml1m", "canary", "20", "--by", "ben")
        story.wait(phase(10, "serving"))
        store, after = open_model_store(story.folder / "models"), 0
        while store.labels("ml1m")["canary"] == 10 and after < 5_000:
            story.requests(400)
            story.lines.pop()
            after += 400
        story.lines.append("  ... some hundred requests are answered ...")
        story.wait(phase(10, "gone"))
        story.run("model", "history", "ml1m")
        story.run("model", "gc", "ml1m", "--keep", "0", "--grace-s", "0", "--by", "anna")
        return story.lines


def roll_over() -> list[str]:
    """Move the pin embeddings, and the ranker with them, to a new embedding space."""
    with story_of() as (story, bundle):
        groups = tuple(with_moved_embeddings(g) if g.entity == "pin" else g for g in bundle.manifest.groups)
        made(story.folder / "out" / "11", bundle, 11, groups=groups)
        story.requests(200)
        story.run("model", "publish", "out/11", "--by", "anna", "--why", "embeddings v3")
        features = f"lmdb://{story.folder / 'features'}"
        story.run("model", "diff", "ml1m", "stable", "11", "--feature-store", features)
        story.say("No caller of this server sends embeddings as a query, so swap.accept_changes accepts the change.")
        story.say("The label may move before its features are loaded: version 11 waits, version 7 goes on answering.")
        story.run("model", "label", "ml1m", "stable", "11", "--by", "anna", "--why", "embeddings v3")
        story.requests(20)
        story.wait(phase(11, "failed"))
        story.run("model", "status")
        before = next(group for group in bundle.manifest.groups if group.entity == "pin")
        asyncio.run(_write_rows(story.folder / "pins.npz", features, before))
        story.run(
            "features", "load", "pins.npz", "--group", before.name, "--feature-store", features,
            "--model-store", "models", "--model", "ml1m", "--label", "stable",
        )  # fmt: skip
        story.wait(phase(11, "serving"))
        story.wait(phase(7, "gone"))
        story.requests(20)
        story.run("model", "status")
        story.run("model", "diff", "ml1m", "7", "stable", "--feature-store", features)
        return story.lines


async def _write_rows(path: Path, features: str, before: FeatureGroup) -> None:
    """Write a file of the new space's features: in this story, the old vectors under the name of the new space."""
    store = open_store(features)
    await store.start()
    ids = np.arange(1, PINS + 1, dtype=np.uint64)
    rows = decode_rows(before, await store.multi_get(before.keys(ids))).rows
    await store.close()
    columns = {"id": ids, **{field.name: rows[field.name] for field in before.fields}}
    np.savez(path, **columns)  # type: ignore[arg-type]


#: Each story's page, and the function that plays it.
STORIES = {
    "bad models": ("models.md", bad_models),
    "roll-over": ("models.md", roll_over),
    "closed loop": ("closed-loop.md", closed_loop),
    "fresh pins": ("embeddings.md", fresh_pins),
}


def page_of(name: str) -> Path:
    """Return the page that shows a story."""
    return ROOT / "docs" / STORIES[name][0]


def shown(lines: list[str]) -> str:
    """Return a transcript as the page shows it: without the temporary folder's path and this machine's name."""
    text = re.sub(r"/(?!/)\S*pinrank-story-[a-z0-9_]+", "/srv", "\n".join(lines))
    # The name keeps its length, so that tables stay aligned.
    return text.replace(whoami(), "pinrank@ranker".ljust(len(whoami()))[: len(whoami())])


def masked(text: str) -> str:
    """Return a transcript with everything masked that differs from run to run."""
    text = re.sub(r" *│\n│[ │]*", " ", text)  # tables wrap sentences at different words
    for pattern, mask in (
        (r"\b[0-9a-f]{64}\b", "DIGEST"),
        (r"\b[0-9a-f]{12}\b", "DIGEST"),
        (r"\+[0-9a-f]{16}\b", "+DIGEST"),
        (r"two vectors is \d\.\d+, and \d+\.\d% of", "two vectors is N, and N% of"),
        (r"\b(\d+) with \d\.\d+", r"\1 with N"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "TIME"),
        (r"guard of \S+", "guard of WHO"),
        (r"\d+(\.\d+)? (ms|MB|s ago|s)\b", r"N \2"),
        (r" +(N s ago)", r" \1"),
        (r"correlation is -?\d\.\d+", "correlation is N"),
        (r"by \d+\.\d+ \(PSI\)", "by N (PSI)"),
        (r"probability \d\.\d+, got \d\.\d+", "probability N, got N"),
        (r"PSI \d+\.\d+", "PSI N"),
        (r"golden row \d+, head '\w+'", "golden row N, head NAME"),
        (r"its \w+ probabilities", "its NAME probabilities"),
        (r"\d+\.\d% of \d+ (recent|candidates|users)", r"N% of N \1"),
        (r"recent requests: -?\d\.\d+", "recent requests: N"),
        (r"finite for all \d+", "finite for all N"),
        (r"candidates of \d+ recent", "candidates of N recent"),
        (r"of \d+ candidates of", "of N candidates of"),
        (r"\d+/\d+ \d+ rows/s", "N rows/s"),
    ):
        text = re.sub(pattern, mask, text)
    # A slow machine may log more attempts that fail in the same way.
    lines = text.splitlines()
    return "\n".join(line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1])


def without_numbers(text: str) -> str:
    """Return a transcript without numbers and what is said about them, which differ wherever requests explore."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", text)
    text = re.sub(r"(?m)^held out, .*$", "held out", text)
    # Whether the interval of a value holds 0 is a matter of luck.
    text = re.sub(r"(?m)^the change of .*\n", "", text)
    # Whether an arm gives the very orders of the tuned weights is another.
    text = re.sub(r"(?m)^(│ orders .*│ +)(refused|enough)", r"\1VERDICT", text)
    text = re.sub(r"(?s)│ [^│]*healthy: .*?└", "└", text)
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+,?)?%?", "N", text)


def main() -> None:
    for name, (_, play) in STORIES.items():
        text = shown(play())
        if "--write" in sys.argv:
            page = page_of(name)
            page.write_text(with_marked(page.read_text(), f"transcript: {name}", f"```console\n{text}\n```"))
        else:
            print(f"== {name}\n{text}\n")


if __name__ == "__main__":
    main()
