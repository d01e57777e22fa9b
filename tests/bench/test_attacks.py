from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import hpack
import pytest

from bench.attacks import callers, frames, fuzz_ports, greedy, idle_connections, resets, retries, scrapes, soak, stops
from bench.attacks.clients import Load, begin, clients, is_over, offer, outcome, results_of, steady
from bench.attacks.fuzz_cases import METHODS, RawCase, RpcCase, case
from bench.attacks.place import callers_file, place, token_of
from bench.harness import BenchmarkError, whole
from bench.processes import descriptors_and_threads
from server.access.caller_file import read_callers
from tests.server.edges import needs_native_edge


def result(offered=100, good=100, p99_ms=5.0, **more):
    return {"offered": offered, "good": good, "degraded": 0, "statuses": {"OK": good}, "p50_ms": 1.0, "p99_ms": p99_ms,
            **more}  # fmt: skip


def claims_of(bench, raw):
    return {claim.name: claim for claim in bench.conclude(raw).claims}


def wait_for_the_end() -> str:
    begin()
    while not is_over():
        time.sleep(0.01)
    return "ended"


def fail() -> None:
    raise ValueError("no such thing")


def test_clients_begin_together_and_end_when_told():
    with clients(wait_for_the_end, wait_for_the_end) as running:
        assert not any(one.done() for one in running)
    assert [one.result() for one in running] == ["ended", "ended"]


def test_a_client_that_cannot_begin_says_why():
    with pytest.raises(BenchmarkError, match="no such thing"):
        results_of(fail, wait_for_the_end)


def test_named_callers_are_known_to_the_server(tmp_path):
    path = callers_file(tmp_path / "callers.toml", ("one", "two"))
    found, _, _ = read_callers(tmp_path / "callers.toml")
    assert path == str(tmp_path / "callers.toml")
    assert sorted(caller.name for caller in found.by_token.values()) == ["one", "two"]
    assert token_of("one") != token_of("two")


def offered(address, requests):
    return offer((Load(address, requests, 20.0, steady(20.0, 0.25)), Load(address, requests, 20.0, steady(20.0, 0.5))))


def test_servers_of_a_place_share_features_and_have_settings_of_their_own(config_file):
    with (
        place(config_file) as ground,
        ground.server("one", {"labels": ["stable"]}, descriptors_max=200) as one,
        ground.server("two", {"candidates_max": 10}) as two,
    ):
        for server, status in ((one, "OK"), (two, "INVALID_ARGUMENT")):
            (found,) = results_of(partial(offered, server.address, ground.requests(50, 4)))
            assert [outcome(samples, 20.0)["statuses"] for samples in found] == [{status: 5}, {status: 10}]
            assert not any(outcome(samples, 20.0)["degraded"] for samples in found)
        assert min(descriptors_and_threads(one.pid)) > 1
        limits = Path(f"/proc/{one.pid}/limits").read_text().splitlines()
        assert next(line.split()[3:5] for line in limits if "open files" in line) == ["200", "200"]


def test_calls_given_up_are_what_http2_says():
    (kind, block), (other, code) = frames.frames_in(frames.begun([7], b"block") + frames.given_up([7]))
    assert (kind, block, other, code) == (frames.HEADERS, b"block", frames.RST_STREAM, bytes([0, 0, 0, 8]))
    headers = frames.call_headers(b"/a/B", [(b"long", b"x" * 40_000), (b"edge", b"y" * 127), (b"", b"z" * 126)])
    assert [one[:2] for one in hpack.Decoder(1 << 20).decode(frames.header_block(headers), raw=True)] == headers


def test_fuzzed_cases_depend_on_seed_and_number_only_and_are_of_every_kind():
    tokens = ("token-of-a-caller", "token-of-the-admin")
    found = [case(number, 1, tokens) for number in range(2_000)]
    assert found == [case(number, 1, tokens) for number in range(2_000)]
    assert found[:9] != [case(number, 2, tokens) for number in range(9)]
    paths = {one.path for one in found if isinstance(one, RpcCase)}
    assert paths > {f"/{method.containing_service.full_name}/{method.name}" for method in METHODS}
    kinds = {(one.kind, one.hangs_up) for one in found if isinstance(one, RawCase)}
    assert kinds == {(kind, hangs_up) for kind in ("frames", "tls", "http") for hangs_up in (False, True)}


def test_the_cost_of_names_is_that_of_each_call_whoever_was_started_first():
    def one(order, with_s, without_s, good=100):
        return {
            "order": order,
            "servers": {"with": result(good=good, cpu_s=with_s), "without": result(cpu_s=without_s)},
        }

    orders = (["without", "with"], ["with", "without"])
    raw = {"callers": 50, "rounds": [one(orders[0], 1.03, 1.0), one(orders[1], 1.01, 1.0), one(orders[1], 9.9, 1.0)]}
    raw["rounds"].append(one(orders[1], 1.01, 1.0))
    (claim,) = callers.conclude(raw).claims
    assert claim.measured == pytest.approx((1.03 * 1.01) ** 0.5)
    raw["rounds"][0] = one(orders[0], 1.0, 1.0, good=0)
    (claim,) = callers.conclude(raw).claims
    assert claim.measured is None


def test_resets_are_judged_by_each_kind_of_attacker():
    def step(good, p99_ms, attacked=True):
        attack = {"resets": 9, "connections": 2, "per_s": 3.0} if attacked else None
        return result(good=good, p99_ms=p99_ms, attack=attack, closed_by_server=1)

    def round_of(alone, one, again):
        return {"alone": step(*alone, attacked=False), "one connection": step(*one), "connecting again": step(*again)}

    found = claims_of(resets, {"rounds": [round_of((100, 2.0), (99, 4.0), (50, 6.0))] * 2})
    assert [(claim.measured, claim.holds) for claim in found.values()] == [
        (0.99, True), (2.0, True), (0.5, False), (3.0, False)
    ]  # fmt: skip
    found = claims_of(resets, {"rounds": [round_of((100, 2.0), (0, None), (0, None))]})
    assert [claim.measured for claim in found.values()] == [0.0, None, 0.0, None]


def test_a_failed_call_among_idle_connections_counts():
    step = {"old connection": {"OK": 5}, "new connection": {"OK": 4, "UNAVAILABLE": 1}, "/livez": {"TimeoutError": 5}}
    crowds = [{"opened": 9, "closed_by_server": 4, "held": 5}] * 2
    raw = {"rounds": [{"alone": {**step, "crowds": []}, "crowded": {**step, "crowds": crowds}}]}
    assert [claim.measured for claim in idle_connections.conclude(raw).claims] == [0, 1, 5]
    nothing = {kind: {} for kind in step}
    raw = {"rounds": [{"alone": nothing, "crowded": {**nothing, "crowds": crowds}}]}
    assert [claim.measured for claim in idle_connections.conclude(raw).claims] == [None] * 3


def test_the_worst_modest_caller_is_judged_over_all_rounds():
    def step(*goods, greedy=7):
        return {"modest": [result(good=good) for good in goods], "greedy": greedy and result(good=greedy)}

    def known(both, alone=(50, 100)):
        return {"modest": step(*alone, greedy=None), "both": step(*both), "greedy": step()}

    raw = {"step_s": 10.0, "rounds": [{"tokens": known((50, 96)), "connections": known((25, 100))}] * 2}
    concluded = greedy.conclude(raw)
    assert [claim.measured for claim in concluded.claims] == [0.96, 0.5]
    assert concluded.summary["known by tokens, greedy alone, rows/s"] == 0.7 * 5_000
    raw = {"step_s": 10.0, "rounds": [{"tokens": known((1, 1), (0, 9)), "connections": known((9, 9))}]}
    assert greedy.conclude(raw).claims[0].measured is None


def test_goodput_with_retries_is_held_against_none_in_the_same_round():
    def round_of(*goods):
        names = ("none", "documented", "RESOURCE_EXHAUSTED too", "never")
        steps = {name: result(good=good, calls_at_server_per_call=1.0) for name, good in zip(names, goods, strict=True)}
        return {"holds_per_s": 9.0, **steps}

    raw = {"step_s": 2.0, "rounds": [round_of(100, 95, 20, 90), round_of(10, 10, 1, 9)]}
    concluded = retries.conclude(raw)
    assert [claim.measured for claim in concluded.claims] == [pytest.approx(0.975)]
    assert concluded.summary["retries: RESOURCE_EXHAUSTED too, goodput over without"] == pytest.approx(0.15)
    assert concluded.summary["retries: never, goodput over without"] == pytest.approx(0.9)
    assert retries.conclude({"step_s": 2.0, "rounds": [round_of(0, 0, 0, 0)]}).claims[0].measured is None


def test_the_documented_policy_is_left_as_it_is():
    exhausted = retries._POLICIES["RESOURCE_EXHAUSTED too"]["methodConfig"][0]["retryPolicy"]
    documented = retries._POLICIES["documented"]["methodConfig"][0]["retryPolicy"]
    assert set(exhausted["retryableStatusCodes"]) - set(documented["retryableStatusCodes"]) == {"RESOURCE_EXHAUSTED"}


def test_stops_are_judged_by_both_clients():
    raw = {
        "stops": [{"stop_s": 1.0, "back_s": 2.0}] * 200,
        "chunks": {"with": [{"OK": 9}, {"OK": 8}], "without": [{"OK": 7, "UNAVAILABLE": 2}, {"CANCELLED": 1}]},
    }
    concluded = stops.conclude(raw)
    assert [claim.measured for claim in concluded.claims] == [200, 1, 0]
    assert concluded.summary["failed without retries"] == 3
    raw["chunks"]["with"].append({"DEADLINE_EXCEEDED": 1})
    assert stops.conclude(raw).claims[2].measured == 1


def soaked(grows=0.0, **more):
    samples = [
        {"at_s": float(i), "rss_bytes": 1e8 * (1 + (i < 20)) + grows * i, "own_bytes": 5e7, "descriptors": 30 + i % 2,
         "threads": 11}
        for i in range(80)
    ]  # fmt: skip
    return {"plan_s": 80.0, "samples": samples, "redis_down": [[30.0, 33.0]], "failures": [], "degraded": 0,
            "swaps": {"done": 2.0}, "statuses": {"Rank": {"OK": 9}}} | more  # fmt: skip


def test_growth_is_judged_after_the_first_quarter():
    steady_one = claims_of(soak, soaked())
    assert [steady_one[f"growth of {what}"].measured for what in ("descriptors", "threads")] == [0, 0]
    assert steady_one["growth of RSS over the judged time"].measured == pytest.approx(0.0, abs=1e-6)
    leaks = claims_of(soak, soaked(grows=1e6))
    assert leaks["growth of RSS over the judged time"].measured == pytest.approx(59.0)
    assert not leaks["growth of RSS an hour"].holds
    raw = soaked()
    for i, sample in enumerate(raw["samples"]):
        sample["threads"] += i // 30
    assert claims_of(soak, raw)["growth of threads"].measured > 0
    raw["samples"] = raw["samples"][:3]
    assert claims_of(soak, raw)["growth of threads"].measured is None


def test_failures_count_unless_redis_was_down():
    failures = [[31.0, "Record", "UNAVAILABLE"], [29.0, "Rank", "INTERNAL"], [50.0, "Record", "UNAVAILABLE"]]
    statuses = {"Rank": {"OK": 9, "INTERNAL": 1}, "Record": {"UNAVAILABLE": 2}}
    concluded = soak.conclude(soaked(failures=failures, statuses=statuses))
    assert concluded.claims[-1].measured == 2
    assert concluded.summary["calls that failed during Redis restarts"] == 1
    statuses["Record"]["UNAVAILABLE"] = 7
    beyond_those_kept = soak.conclude(soaked(failures=failures, statuses=statuses)).claims[-1]
    assert beyond_those_kept.measured == 7


def fuzzed(**more):
    held = {"pinrank_connections": 0.0, "descriptors": 20, "threads": 11}
    return {"cases": 10, "seconds": 1.0, "outcomes": {"call OK": 10}, "faults": [], "leaks": [], "errors_logged": [],
            "before": held, "after": held, "ranks_afterwards": {"OK": 8}} | more  # fmt: skip


@pytest.mark.parametrize(
    ("more", "failing"),
    [
        ({}, None),
        ({"faults": ["case 3: INTERNAL"]}, "fault"),
        ({"leaks": ["a token in the log"]}, "secrets"),
        ({"errors_logged": ["request_failed"]}, "failures"),
        ({"ranks_afterwards": {"OK": 7, "degraded": 1}}, "afterwards"),
        ({"after": {"pinrank_connections": 0.0, "descriptors": 21, "threads": 11}}, "holds more"),
    ],
)
def test_each_fault_under_fuzzing_fails_its_own_claim(more, failing):
    claims = [claim for claim in fuzz_ports.conclude(fuzzed(**more)).claims if claim.name != "cases"]
    assert [failing in claim.name for claim in claims if not claim.holds] == ([True] if failing else [])


def test_secrets_in_answers_are_found_also_in_compressed_headers():
    secret = next(iter(fuzz_ports._SECRETS.values()))
    block = hpack.Encoder().encode([(b"grpc-message", secret.encode())])
    received = frames.frame(frames.HEADERS, frames.END_HEADERS, 1, block)
    assert secret.encode() not in received
    findings = fuzz_ports.Findings()
    findings.check(5, received, *fuzz_ports._headers_in(received))
    assert findings.faults[0].startswith("case 5: the answer has the admin's token")


@needs_native_edge
def test_two_thousand_hostile_inputs_break_nothing_and_bring_no_secret_to_light(config_file):
    raw = whole(fuzz_ports.measure(quick=True, config=config_file))
    failed = [claim.name for claim in fuzz_ports.conclude(raw).claims if not claim.holds]
    assert failed == ["cases"], raw
    assert raw["cases"] == 2_000
    assert raw["outcomes"]["call OK"] > 20
    assert {"frames closed", "tls closed", "http closed"} <= raw["outcomes"].keys()


@needs_native_edge
@pytest.mark.parametrize("bench", [callers, resets, idle_connections])
def test_a_quick_run_measures_every_part(bench, config_file):
    raw = whole(bench.measure(quick=True, config=config_file))
    assert len(raw["rounds"]) == 1
    claims = bench.conclude(raw).claims
    assert all(claim.measured is not None for claim in claims)
    if bench is resets:
        assert raw["rounds"][0]["connecting again"]["closed_by_server"] >= 1
    if bench is idle_connections:
        assert all(crowd["opened"] > 100 for crowd in raw["rounds"][0]["crowded"]["crowds"])


def test_what_scrapes_and_a_flood_cost_is_measured_beside_ranking(config_file):
    raw = whole(scrapes.measure(quick=True, config=config_file))
    (only,) = raw["rounds"]
    assert (only["0 scrapes/s"]["scrapes"], only["50 scrapes/s"]["scrapes"] > 1) == (0, True)
    assert only["flood"]["checks"]
    assert {claim.unit for claim in scrapes.conclude(raw).claims} == {"ratio", "share"}
