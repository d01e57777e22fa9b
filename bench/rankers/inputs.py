"""What the published rankers read: the inputs of our networks, without similarities, and the numbers of known pins.

Imports nothing but PyTorch, so that the modules that read it also run beside RecBole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Tensors by name, as `ranker.training.minibatches.tensors` returns them, and these two:
#: - `pin_number`: int64[N], the number of each candidate, from 1; 0 for pins that are not known.
#: - `sequence_numbers`: int64[R, L], those of the actions' pins.
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that the data decides.

    Attributes:
        heads: number of predicted actions.
        dim: of the stored vectors.
        user_scalars: scalars of a user.
        pin_scalars: scalars of a pin.
        surfaces: number of surfaces.
        actions: kinds of action.
        length: actions of a sequence.
        pins: known pins.
    """

    heads: int
    dim: int
    user_scalars: int
    pin_scalars: int
    surfaces: int
    actions: int
    length: int
    pins: int


class DenseFeatures(nn.Module):
    """All inputs but the sequence as one vector for each row, the scalars standardised by the training rows."""

    user_mean: Tensor
    user_deviation: Tensor
    pin_mean: Tensor
    pin_deviation: Tensor

    def __init__(self, shape: Shape, surface_dim: int = 4) -> None:
        super().__init__()
        for side, width in (("user", shape.user_scalars), ("pin", shape.pin_scalars)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_deviation", torch.ones(width))
        self.surface = nn.Embedding(shape.surfaces, surface_dim)
        self.width = 3 * shape.dim + shape.user_scalars + shape.pin_scalars + surface_dim

    def standardise(self, user_scalars: Tensor, pin_scalars: Tensor) -> None:
        """Set the constants of standardisation from float32[R, S] and float32[N, S]."""
        for side, values in (("user", user_scalars), ("pin", pin_scalars)):
            deviation = values.std(dim=0, unbiased=False)
            getattr(self, f"{side}_mean").copy_(values.mean(dim=0))
            # A constant says nothing, and must not be divided by its deviation of almost 0.
            getattr(self, f"{side}_deviation").copy_(torch.where(deviation < 1e-3, 1.0, deviation))

    def forward(self, inputs: Inputs) -> Tensor:
        """Return float32[N, W]."""
        user = (inputs["user_scalars"] - self.user_mean) / self.user_deviation
        pin = (inputs["pin_scalars"] - self.pin_mean) / self.pin_deviation
        of_request = torch.cat([inputs["user_embedding"], user, self.surface(inputs["surface"]), inputs["query"]], -1)
        return torch.cat([of_request[inputs["row_request"]], inputs["pin_embedding"], pin], dim=-1)


class PinVectors(nn.Module):
    """A learned vector for each pin: a linear map of its stored vector, plus a vector of its own if it is known.

    The papers have the second part only, which knows nothing of new pins.
    """

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.stored = nn.Linear(shape.dim, dim, bias=False)
        self.own = nn.Embedding(shape.pins + 1, dim, padding_idx=0)
        with torch.no_grad():
            self.own.weight.mul_(0.01)

    def forward(self, embedding: Tensor, number: Tensor) -> Tensor:
        """Return float32[..., D] from float32[..., S] and int64[...]."""
        mapped: Tensor = self.stored(embedding) + self.own(number)
        return mapped


class Actions(nn.Module):
    """The user's actions as vectors: of their pins, and of the kind of action. Zeros past the end.

    The papers' sequences hold one kind of action, or name it among the features; ours mix them.
    """

    def __init__(self, shape: Shape, pins: PinVectors, dim: int) -> None:
        super().__init__()
        self.pins = pins
        self.kind = nn.Embedding(shape.actions + 1, dim, padding_idx=0)
        with torch.no_grad():
            self.kind.weight.mul_(0.1)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return float32[R, L, D], newest first."""
        pins = self.pins(inputs["sequence_embeddings"], inputs["sequence_numbers"])
        present = (inputs["sequence_actions"] > 0).unsqueeze(-1)
        vectors: Tensor = (pins + self.kind(inputs["sequence_actions"])) * present
        return vectors
