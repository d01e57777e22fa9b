"""Measure the models of published GPU benchmarks on this card, to compare them with ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.gpu.measurements.subject import SKUT_LIKE, Batch, GpuSubject, device_of, length_of
from bench.gpu.measurements.timing import graphed, rates, seconds_of
from bench.gpu.numbers import Numbers
from bench.gpu.plan import DRY_SHAPES, SHAPES

#: MLPerf's dlrm_v3 on one H100: 32 requests with 2,048 candidates, five layers of width 512.
HSTU_PUBLISHED_MS = 9.3
#: 256 sequences of 256 tokens with 64 numbers, two layers, one fused Triton kernel on an L40S (arXiv 2506.02267).
SKUT_PUBLISHED_MS = 0.324
_ROWS_AT_ONCE = 4096


class HstuLike(nn.Module):
    """Layers like those of HSTU (arXiv 2402.17152): gated pointwise attention, without softmax and feed-forward.

    Candidates attend to the history and to themselves, but not to each other.
    """

    def __init__(self, width: int = 512, heads: int = 4, layers: int = 5) -> None:
        super().__init__()
        self._heads = heads
        self._in = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self._out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self._norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, tokens: Tensor, history: int) -> Tensor:
        """Transform tokens, [R, T, width]: those of the user's actions, followed by those of candidates."""
        layers = zip(self._in, self._out, self._norms[::2], self._norms[1::2], strict=True)
        for spread, gather, before, after in layers:
            gate, value, query, key = functional.silu(spread(before(tokens))).chunk(4, dim=-1)
            query, key, value = (self._split(one) for one in (query, key, value))
            past_key, past_value = key[:, :, :history], value[:, :, :history]
            scores = functional.silu(query @ past_key.transpose(-1, -2))
            # An action attends to itself and earlier ones, a candidate to all actions and itself.
            scores = torch.cat([scores[:, :, :history].tril(), scores[:, :, history:]], dim=2)
            mixed = scores @ past_value
            own = functional.silu((query * key).sum(-1, keepdim=True))[:, :, history:] * value[:, :, history:]
            mixed = torch.cat([mixed[:, :, :history], mixed[:, :, history:] + own], dim=2) / history
            tokens = tokens + gather(gate * after(mixed.transpose(1, 2).flatten(2)))
        return tokens

    def _split(self, tokens: Tensor) -> Tensor:
        """Return [R, heads, T, width of a head]."""
        return tokens.view(*tokens.shape[:2], self._heads, -1).transpose(1, 2)


def public(_out: Path, numbers: Numbers) -> None:
    """Measure the public shapes, then the published form of ours compiled by PyTorch, if there is time."""
    device, dry_run = device_of(dry_run=numbers.dry_run), numbers.dry_run

    def measured(make: Any, rows: int, **about: Any) -> dict[str, Any]:
        run = make()
        graph = run if dry_run else graphed(run)
        seconds = seconds_of(graph, device, 1 if dry_run else 100, _soon(numbers))
        return {**about, **rates(seconds, rows)}

    requests, candidates, history = (1, 3, 4) if dry_run else (32, 2048, 1280)
    numbers.measure(
        "HSTU-like",
        partial(
            measured, partial(_hstu, device, requests, candidates, history), requests * candidates,
            requests=requests, candidates=candidates, history=history, published_ms=HSTU_PUBLISHED_MS,
        ),
    )  # fmt: skip
    sequences, tokens = (1, 16) if dry_run else (256, 256)

    def skut(form: str) -> Any:
        subject = GpuSubject(device, SKUT_LIKE, tokens)
        batch = Batch([1] * sequences, device, SKUT_LIKE, tokens)
        return subject.fused(batch) if form == "our kernel" else subject.published(batch, _ROWS_AT_ONCE)

    for form in ("our kernel", "published form"):
        about = {"sequences": sequences, "tokens": tokens, "published_ms": SKUT_PUBLISHED_MS}
        numbers.measure(f"SKUT-like, {form}", partial(measured, partial(skut, form), sequences, **about), 2)

    def compiled() -> dict[str, Any]:
        requests, rows = (DRY_SHAPES if dry_run else SHAPES)[-1]
        length = length_of(dry_run=dry_run)
        batch = Batch([rows] * requests, device, length=length)
        run = GpuSubject(device, length=length).published(batch, _ROWS_AT_ONCE, compiled=not dry_run)
        # Compiled modules have their own graphs, so this one is not captured.
        found = rates(seconds_of(run, device, 1 if dry_run else 20, numbers.until_s), batch.rows)
        return {**found, **({"without": "torch.compile"} if dry_run else {})}

    numbers.measure("published form, compiled", compiled, 0.5 if dry_run else 12)


def _hstu(device: torch.device, requests: int, candidates: int, history: int) -> Any:
    """Return a function that runs five layers of width 512.

    The publication does not state the length of the histories. Its 27% of an H100's peak in 9.3 ms are 38 MFLOP per
    candidate, which these layers need for a candidate and its share of 1,280 actions.
    """
    torch.manual_seed(0)
    module = HstuLike().eval().to(device, torch.bfloat16)
    tokens = torch.randn(requests, history + candidates, 512, device=device, dtype=torch.bfloat16)

    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = module(tokens, history)
        return found

    return run


def _soon(numbers: Numbers) -> float:
    """Return the end of the time for one number, so that the others get their share of the rest."""
    return numbers.until_s - numbers.left_s() * 2 / 3
