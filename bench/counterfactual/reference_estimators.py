"""The estimates of sb-obp, an independent library, on a synthetic log: what our estimators are compared with.

sb-obp needs NumPy 1, so it runs in an environment of its own:

    python -m venv .venv-obp && .venv-obp/bin/pip install sb-obp==0.5.10
    .venv-obp/bin/python bench/counterfactual/reference_estimators.py tests/ranker/counterfactual/reference.json

It writes the table that `tests/ranker/counterfactual/test_estimators.py` reads. The log follows from its seed alone and
needs only NumPy, so that the test makes the same one.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

SEED = 22
ROUNDS, CHOICES = 1_000, 5
CLIP = 2.0


def synthetic_log() -> dict[str, np.ndarray]:
    """Return `choice` int64[R], `reward` float64[R], and `logged`, `evaluated` and `predicted`, float64[R, CHOICES]."""
    rng = np.random.default_rng(SEED)
    logged = 0.05 + rng.random((ROUNDS, CHOICES))
    logged /= logged.sum(axis=1, keepdims=True)
    evaluated = rng.random((ROUNDS, CHOICES)) ** 3
    evaluated /= evaluated.sum(axis=1, keepdims=True)
    truth = rng.random((ROUNDS, CHOICES)) * np.linspace(0.1, 0.9, CHOICES)
    choice = np.minimum((rng.random((ROUNDS, 1)) > np.cumsum(logged, axis=1)).sum(axis=1), CHOICES - 1)
    reward = (rng.random(ROUNDS) < truth[np.arange(ROUNDS), choice]).astype(np.float64)
    predicted = 0.8 * truth + 0.1 * rng.random((ROUNDS, CHOICES))
    return {"choice": choice, "reward": reward, "logged": logged, "evaluated": evaluated, "predicted": predicted}


def reference() -> dict[str, float]:
    """Estimate with sb-obp, by our names of its estimators."""
    from obp import ope  # type: ignore[import-not-found]  # noqa: PLC0415 - in an environment of its own

    log = synthetic_log()
    found = {}
    for name, estimator in {
        "ips": ope.InverseProbabilityWeighting(),
        "snips": ope.SelfNormalizedInverseProbabilityWeighting(),
        "clipped": ope.InverseProbabilityWeighting(lambda_=CLIP),
        "dm": ope.DirectMethod(),
        "dr": ope.DoublyRobust(),
        "sndr": ope.SelfNormalizedDoublyRobust(),
        "clipped-dr": ope.DoublyRobust(lambda_=CLIP),
    }.items():
        found[name] = float(
            estimator.estimate_policy_value(
                reward=log["reward"],
                action=log["choice"],
                pscore=log["logged"][np.arange(ROUNDS), log["choice"]],
                action_dist=log["evaluated"][:, :, None],
                estimated_rewards_by_reg_model=log["predicted"][:, :, None],
            )
        )
    return found


if __name__ == "__main__":
    content = {"sb-obp": version("sb-obp"), "estimates": reference()}
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n")
