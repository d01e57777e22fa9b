from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.rollout.lifecycle import (
    FOLLOWING,
    Drain,
    Forget,
    Load,
    Phase,
    PhaseError,
    Retry,
    Route,
    See,
    Serve,
    Snapshot,
    Unload,
    Unroute,
    VersionState,
    decide,
    followed,
)

SEEN, VERIFYING, WARMING, READY, SERVING, DRAINING, GONE, FAILED = Phase


def snapshot(labels=None, routes=None, pinned=(), now_s=0.0, **known):
    """`v7=SERVING` or `v7=Known(...)`."""
    found = {int(name[1:]): k if isinstance(k, VersionState) else VersionState(k) for name, k in known.items()}
    return Snapshot(now_s, labels or {}, frozenset(pinned), found, routes or {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (snapshot({"stable": 1}), (See(1),)),
        (snapshot({"stable": 1}, v1=SEEN), (Load(1),)),
        (snapshot({"stable": 1}, v1=VERIFYING), ()),
        (snapshot({"stable": 1}, v1=WARMING), ()),
        (snapshot({"stable": 1}, v1=READY), (Route("stable", 1),)),
        (snapshot({"stable": 1}, {"stable": 1}, v1=SERVING), ()),
        # The old version answers until the new one is ready.
        (snapshot({"stable": 2}, {"stable": 1}, v1=SERVING, v2=WARMING), ()),
        (snapshot({"stable": 2}, {"stable": 1}, v1=SERVING, v2=READY), (Route("stable", 2),)),
        (snapshot({"stable": 2}, {"stable": 2}, v1=SERVING, v2=SERVING), (Drain(1),)),
        # ... and where it fails.
        (snapshot({"stable": 2}, {"stable": 1}, v1=SERVING, v2=FAILED), ()),
        (snapshot({"stable": 1}, {"stable": 1}, v1=SERVING, v2=FAILED), (Forget(2),)),
        (
            snapshot({"stable": 2}, {"stable": 1}, now_s=5, v1=SERVING, v2=VersionState(FAILED, retry_at_s=5)),
            (Retry(2),),
        ),
        (snapshot({"stable": 2}, {"stable": 1}, now_s=4, v1=SERVING, v2=VersionState(FAILED, retry_at_s=5)), ()),
        # Nothing is unloaded under a request.
        (snapshot({"stable": 2}, {"stable": 2}, v1=VersionState(DRAINING, 3), v2=SERVING), ()),
        (snapshot({"stable": 2}, {"stable": 2}, v1=DRAINING, v2=SERVING), (Unload(1),)),
        # Rolled back while it drains: at once.
        (snapshot({"stable": 1}, {"stable": 2}, v1=VersionState(DRAINING, 3), v2=SERVING), (Route("stable", 1),)),
        # One at a time, the first label's first.
        (snapshot({"stable": 2, "canary": 3}, v2=SEEN, v3=SEEN), (Load(2),)),
        (snapshot({"stable": 2, "canary": 3}, v2=SEEN, v3=VERIFYING), ()),
        (snapshot({"stable": 2, "canary": 3}, v2=FAILED, v3=SEEN), (Load(3),)),
        # Two labels on one version.
        (snapshot({"stable": 1, "canary": 1}, {"stable": 1}, v1=SERVING), (Route("canary", 1),)),
        (snapshot({"stable": 1}, {"stable": 1, "canary": 1}, v1=SERVING), (Unroute("canary"),)),
        (snapshot({"stable": 1}, {"stable": 1, "canary": 2}, v1=SERVING, v2=SERVING), (Unroute("canary"),)),
        # Held without a label.
        (snapshot({}, pinned={4}), (See(4),)),
        (snapshot({}, pinned={4}, v4=READY), (Serve(4),)),
        (snapshot({}, pinned={4}, v4=SERVING), ()),
        (snapshot({}, v4=SERVING), (Drain(4),)),
        (snapshot({}, v4=SEEN), (Forget(4),)),
    ],
)
def test_decisions(given, expected):
    assert decide(given) == expected


def test_only_the_tables_steps_are_allowed():
    for before in Phase:
        for after in Phase:
            if after in FOLLOWING[before]:
                assert followed(before, after) is after
            else:
                with pytest.raises(PhaseError, match=f"from {before} to {after}"):
                    followed(before, after)


class Shell:
    """Does what is decided, as a server would, with versions that fail or not."""

    def __init__(self):
        self.known, self.routes, self.labels, self.pinned, self.now_s = {}, {}, {"stable": 0}, set(), 0.0
        self.known[0], self.routes["stable"] = VersionState(SERVING), 0
        self.loading = None

    def snapshot(self):
        return Snapshot(self.now_s, dict(self.labels), frozenset(self.pinned), dict(self.known), dict(self.routes))

    def become(self, version, phase, **changes):
        one = self.known[version]
        self.known[version] = VersionState(followed(one.phase, phase), changes.get("in_flight", one.in_flight))

    def act(self, decision):
        match decision:
            case See(version):
                assert version not in self.known
                self.known[version] = VersionState(SEEN)
            case Load(version):
                assert self.loading is None
                self.become(version, VERIFYING)
                self.loading = version
            case Route(label, version):
                if self.known[version].phase is not SERVING:
                    self.become(version, SERVING)
                self.routes[label] = version
            case Unroute(label):
                del self.routes[label]
            case Serve(version):
                self.become(version, SERVING)
            case Drain(version):
                assert version not in self.routes.values()
                self.become(version, DRAINING)
            case Unload(version):
                assert self.known[version].in_flight == 0
                assert version not in self.routes.values()
                del self.known[version]
            case Retry(version):
                self.become(version, SEEN)
            case Forget(version):
                assert self.known[version].phase in {SEEN, FAILED}
                del self.known[version]

    def settle(self):
        for _ in range(50):
            decisions = decide(self.snapshot())
            assert decisions == decide(self.snapshot())
            if not decisions:
                return
            for decision in decisions:
                self.act(decision)
        raise AssertionError("it never settles")

    def loaded(self, ok):
        version, self.loading = self.loading, None
        if not ok:
            self.known[version] = VersionState(followed(self.known[version].phase, FAILED), retry_at_s=math.inf)
            return
        if self.known[version].phase is VERIFYING:
            self.become(version, WARMING)
        self.become(version, READY)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("label"), st.sampled_from(["stable", "canary", "shadow"]), st.integers(0, 9)),
        st.tuples(st.just("unlabel"), st.sampled_from(["canary", "shadow"]), st.none()),
        st.tuples(st.just("loaded"), st.booleans(), st.none()),
        st.tuples(st.just("request"), st.sampled_from(["stable", "canary", "shadow"]), st.booleans()),
        st.tuples(st.just("pin"), st.integers(0, 9), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_whatever_happens_the_default_label_is_answered_and_nothing_is_pulled_from_under_a_request(events):
    shell, held = Shell(), []
    for kind, one, other in events:
        match kind:
            case "label":
                shell.labels[one] = other
            case "unlabel":
                shell.labels.pop(one, None)
            case "loaded" if shell.loading is not None:
                shell.loaded(one)
            case "request" if one in shell.routes:
                version = shell.routes[one]
                if other:
                    held.append(version)
                    shell.known[version] = VersionState(shell.known[version].phase, shell.known[version].in_flight + 1)
                elif held:
                    version = held.pop(0)
                    shell.known[version] = VersionState(shell.known[version].phase, shell.known[version].in_flight - 1)
            case "pin":
                (shell.pinned.add if other else shell.pinned.discard)(one)
        shell.settle()
        assert shell.known[shell.routes["stable"]].phase is SERVING
        for version in held:
            assert shell.known[version].phase in {SERVING, DRAINING}
    while shell.loading is not None:
        shell.loaded(ok=True)
        shell.settle()
    for version in held:
        shell.known[version] = VersionState(shell.known[version].phase, 0)
    shell.settle()
    wanted = set(shell.labels.values()) | shell.pinned | set(shell.routes.values())
    assert set(shell.known) == wanted
    for label, version in shell.labels.items():
        assert shell.routes.get(label) == version or shell.known[version].phase is FAILED
