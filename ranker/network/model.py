"""The ranking network: an encoder of the last actions, combined with all other features, gives one logit per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranker.errors import SettingError
from ranker.network.encoder import CrossFusion, EarlyFusion, LateFusion, per_row
from ranker.network.pieces import Pieces
from ranker.network.serving_form import encode_cross, encode_early, encode_late, split_linear

Fusion = Literal["none", "late", "early", "cross"]
FUSIONS: tuple[Fusion, ...] = ("none", "late", "early", "cross")


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """All sizes of a network; the defaults of the encoder are the published sizes.

    Attributes:
        fusion: how the network combines sequence and candidate. `none` reads no sequence; `late` encodes the sequence
            alone; `early` puts the candidate into every token; `cross` lets the candidate attend to the sequence, which
            is encoded alone.
        readout_dim: width to which the encoder's readout is mapped before it joins the other features; 0 joins it
            unmapped.
        read_once: whether the readout of late fusion is a feature of the request, whose products are made once for all
            of its candidates, rather than a feature of each row.
        cross_rank: rank of the cross network's maps; 0 for full rank, whose cost is quadratic in the width.
    """

    heads: int
    actions: int
    surfaces: int
    scalars: int
    #: Scalars that only pins, or only users, have: the data's own columns.
    pin_features: int = 0
    user_features: int = 0
    #: Columns of `model_store.model.recency`; 0 for a network that does not read them.
    recency: int = 0
    #: Columns of `model_store.model.similarities`; 0 for a network that does not read them.
    similarities: int = 0
    #: A user's interests; 0 for a network that does not read them.
    interests: int = 0
    #: Numbers of the vector of a user that a network of users makes; 0 for a network that does not read it.
    user_vector: int = 0
    #: Pieces into which the range of each scalar and similarity is divided; 0 for a network without pieces.
    pieces: int = 0
    #: Width to which the pieces are mapped before they are crossed with the other features.
    pieces_dim: int = 32
    #: Numbers of a vector.
    dim: int = 32
    #: Numbers of each vector, from the first, that are crossed with the other features; 0 for all. Similarities compare
    #: whole vectors, and the encoder maps them to a smaller width. For long vectors that begin with what says most, as
    #: an SVD's do, where crossing all is learned by heart or costs too much.
    crossed_dim: int = 0
    fusion: Fusion = "early"
    action_dim: int = 32
    token_pin_dim: int = 32
    encoder_layers: int = 2
    encoder_hidden: int = 32
    readout_rows: int = 10
    readout_pool: bool = False
    readout_dim: int = 64
    read_once: bool = False
    surface_dim: int = 4
    cross_layers: int = 2
    cross_rank: int = 0
    hidden: tuple[int, ...] = (128, 64)
    #: Factor for the width of the dense layers and for the sizes of `hidden`.
    widen: int = 1
    #: Only in the layers after the cross network: masks for every token would double the training time.
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise SettingError(f"fusion must be one of {', '.join(FUSIONS)}, but is {self.fusion!r}")

    @property
    def sequence(self) -> bool:
        return self.fusion != "none"

    @property
    def crossed_numbers(self) -> int:
        """Numbers of each vector that are crossed with the other features."""
        return min(self.crossed_dim or self.dim, self.dim)

    @property
    def compared(self) -> int:
        """How many vectors, or means of vectors, each candidate is compared with."""
        return self.similarities + self.interests


#: The initial weight of the product of user and pin on every head's logit.
_DIRECT = 0.3


class CrossNetwork(nn.Module):
    """DCN-v2 (arXiv 2008.13535): each layer multiplies the input by a linear map of the previous layer's output.

    A map of low rank is a product of two narrow ones.
    """

    def __init__(self, width: int, layers: int, rank: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, rank or width, bias=not rank) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers)) if rank else None

    def forward(self, request_part: Tensor, row_part: Tensor, row_request: Tensor) -> Tensor:
        """Cross [request; row] of float[R, U] and float[N, C]; the first layer maps the request part only once."""
        inputs = torch.cat([per_row(request_part, row_request), row_part], dim=-1)
        crossed = inputs
        for number, layer in enumerate(self.layers):
            if number == 0:
                of_request, of_row = split_linear(layer, (request_part.shape[-1], row_part.shape[-1]))  # type: ignore[arg-type]
                once = functional.linear(request_part, of_request, layer.bias)  # type: ignore[arg-type]
                mapped = per_row(once, row_request) + functional.linear(row_part, of_row)
            else:
                mapped = layer(crossed)
            if self.out is not None:
                mapped = self.out[number](mapped)
            crossed = inputs * mapped + crossed
        return crossed


class RankerNetwork(nn.Module):
    """One logit per head for every (request, candidate) row.

    Inputs have the names in the manifest. Tensors of a request occur once, and `row_request` maps each row to its
    request. `forward` computes the serving form, which equals what `published` computes from the same parameters.
    """

    user_mean: Tensor
    user_deviation: Tensor
    pin_mean: Tensor
    pin_deviation: Tensor
    similarities_mean: Tensor
    similarities_deviation: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        of_user = config.scalars + config.user_features + config.recency + config.interests
        of_pin = config.scalars + config.pin_features
        standardised = {"user": of_user, "pin": of_pin}
        if config.compared:
            standardised["similarities"] = config.compared
        for name, width in standardised.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_deviation", torch.ones(width))
        self.encoder = _encoder(config)
        self._once = config.read_once and config.fusion == "late"
        self.surface = nn.Embedding(config.surfaces, config.surface_dim)
        # Of another space than the pins': mapped to theirs, to the numbers that are crossed.
        self.user_vector = nn.Linear(config.user_vector, config.crossed_numbers) if config.user_vector else None
        mapped = config.crossed_numbers if config.user_vector else 0
        request_width = 2 * config.crossed_numbers + of_user + config.surface_dim + mapped
        # Pieces of the similarities are crossed in their place.
        row_width = 3 * config.crossed_numbers + of_pin + mapped + (0 if config.pieces else config.compared)
        # Past all layers, so that a network orders by them before it has learned anything else.
        direct = config.compared
        if config.pieces:
            of_row = of_pin + config.compared
            self.user_pieces, self.row_pieces = Pieces(of_user, config.pieces), Pieces(of_row, config.pieces)
            self.user_number = nn.Linear(of_user * config.pieces, config.pieces_dim)
            self.row_number = nn.Linear(of_row * config.pieces, config.pieces_dim)
            request_width += config.pieces_dim
            row_width += config.pieces_dim
            direct += of_row * config.pieces
        self.direct = _direct(config, direct)
        self.readout: nn.Linear | None = None
        if self.encoder is not None:
            if config.readout_dim:
                self.readout = nn.Linear(self.encoder.width, config.readout_dim)
            read_width = config.readout_dim or self.encoder.width
            if self._once:
                request_width += read_width
            else:
                row_width += read_width
        # A wider network first maps its inputs to the larger width; the base network crosses them directly.
        self.widen_request = self.widen_row = None
        if config.widen > 1:
            self.widen_request = nn.Linear(request_width, request_width * config.widen)
            self.widen_row = nn.Linear(row_width, row_width * config.widen)
        width = (request_width + row_width) * config.widen
        self.cross = CrossNetwork(width, config.cross_layers, config.cross_rank)
        layers: list[nn.Module] = []
        for size in config.hidden:
            layers += [nn.Linear(width, size * config.widen), nn.ReLU(), nn.Dropout(config.dropout)]
            width = size * config.widen
        self.deep = nn.Sequential(*layers, nn.Linear(width, config.heads))

    def forward(
        self,
        user_embedding: Tensor,
        user_scalars: Tensor,
        surface: Tensor,
        query: Tensor,
        pin_embedding: Tensor,
        pin_scalars: Tensor,
        row_request: Tensor,
        sequence_actions: Tensor | None = None,
        sequence_embeddings: Tensor | None = None,
        similarities: Tensor | None = None,
        recency: Tensor | None = None,
        interests: Tensor | None = None,
        interest_importances: Tensor | None = None,
        interest_similarities: Tensor | None = None,
        user_vector: Tensor | None = None,
    ) -> Tensor:
        """Return float32[N, H] logits.

        Args:
            user_embedding: float32[R, D].
            user_scalars: float32[R, S].
            surface: int64[R].
            query: float32[R, D], zeros if there is no query.
            pin_embedding: float32[N, D].
            pin_scalars: float32[N, S].
            row_request: int64[N].
            sequence_actions: int64[R, L], newest first, 0 past the end; required if the network reads the sequence.
            sequence_embeddings: float32[R, L, D].
            similarities: float32[N, K]; required if the network reads them.
            recency: float32[R, 4]; required if the network reads it.
            interests: float32[R, I, D]; what the similarities to interests are made of, and read only there.
            interest_importances: float32[R, I]; required if the network reads interests.
            interest_similarities: float32[N, I]; required if the network reads interests.
            user_vector: float32[R, V]; required if the network reads it.
        """
        read = None
        if sequence_actions is not None and sequence_embeddings is not None:
            read = self.encode(sequence_actions, sequence_embeddings, pin_embedding, row_request)
        return self.score(
            *(user_embedding, user_scalars, surface, query, pin_embedding, pin_scalars, row_request),
            read=read,
            similarities=similarities,
            recency=recency,
            interests=interests,
            interest_importances=interest_importances,
            interest_similarities=interest_similarities,
            user_vector=user_vector,
        )

    def encode(self, actions: Tensor, embeddings: Tensor, pin_embedding: Tensor, row_request: Tensor) -> Tensor:
        """Return the readout of the encoder in its serving form, float32[N, W]; float32[R, W] of late fusion."""
        match self.encoder:
            case EarlyFusion():
                return encode_early(self.encoder, actions, embeddings, pin_embedding, row_request)
            case LateFusion():
                return encode_late(self.encoder, actions, embeddings, pin_embedding, row_request)
            case CrossFusion():
                return encode_cross(self.encoder, actions, embeddings, pin_embedding, row_request)
            case _:
                raise TypeError("this network reads no sequence")

    def published(self, **inputs: Tensor) -> Tensor:
        """Compute `forward` with the plain encoder modules, row by row as published: slow, but the oracle."""
        actions, embeddings = inputs.pop("sequence_actions", None), inputs.pop("sequence_embeddings", None)
        read = None
        if self.encoder is not None:
            read = self.encoder(actions, embeddings, inputs["pin_embedding"], inputs["row_request"])
        return self.score(**inputs, read=read)

    def score(
        self,
        user_embedding: Tensor,
        user_scalars: Tensor,
        surface: Tensor,
        query: Tensor,
        pin_embedding: Tensor,
        pin_scalars: Tensor,
        row_request: Tensor,
        read: Tensor | None,
        similarities: Tensor | None = None,
        recency: Tensor | None = None,
        interests: Tensor | None = None,  # noqa: ARG002 - an input of the network all the same
        interest_importances: Tensor | None = None,
        interest_similarities: Tensor | None = None,
        user_vector: Tensor | None = None,
    ) -> Tensor:
        """Return logits from all other inputs and from `read`, what `encode` returns."""
        user_scalars = _joined(user_scalars, recency, interest_importances)
        numbers = self.config.crossed_numbers
        if numbers < self.config.dim:  # not one more operator in the exported network
            user_embedding, query, pin_embedding = (
                vector[..., :numbers] for vector in (user_embedding, query, pin_embedding)
            )
        asked, user = per_row(query, row_request), per_row(user_embedding, row_request)
        of_request = [
            user_embedding,
            (user_scalars - self.user_mean) / self.user_deviation,
            self.surface(surface),
            query,
        ]
        of_row = [
            pin_embedding,
            (pin_scalars - self.pin_mean) / self.pin_deviation,
            # Products of unit vectors are small compared with standardised scalars, so they are scaled up.
            numbers * pin_embedding * asked,
            numbers * pin_embedding * user,
        ]
        if self.user_vector is not None:
            of_request.append(self.user_vector(user_vector))
            of_row.append(numbers * pin_embedding * per_row(of_request[-1], row_request))
        direct: list[Tensor] = []
        measured = [pin_scalars]
        if similarities is not None or interest_similarities is not None:
            similarities = _joined(similarities, interest_similarities)
            measured.append(similarities)
            direct.append((similarities - self.similarities_mean) / self.similarities_deviation)
            of_row += [] if self.config.pieces else direct
        if self.config.pieces:
            direct.append(self.row_pieces(torch.cat(measured, dim=-1)))
            of_request.append(self.user_number(self.user_pieces(user_scalars)))
            of_row.append(self.row_number(direct[-1]))
        if read is not None:
            read = read if self.readout is None else self.readout(read)
            if self._once:
                of_request.append(read)
            else:
                of_row.append(per_row(read, row_request) if self.config.fusion == "late" else read)
        request_part, row_part = torch.cat(of_request, dim=-1), torch.cat(of_row, dim=-1)
        if self.widen_request is not None and self.widen_row is not None:
            request_part, row_part = self.widen_request(request_part), self.widen_row(row_part)
        logits: Tensor = self.deep(self.cross(request_part, row_part, row_request))
        return logits if self.direct is None else logits + self.direct(torch.cat(direct, dim=-1))

    def standardise(self, user_scalars: Tensor, pin_scalars: Tensor, similarities: Tensor | None = None) -> None:
        """Set the constants of standardisation.

        Args:
            user_scalars: float32[R, S], with recency and the importances of interests.
            pin_scalars: float32[N, S].
            similarities: float32[N, K], with those to interests.
        """
        for side, values in (("user", user_scalars), ("pin", pin_scalars), ("similarities", similarities)):
            if values is None:
                continue
            getattr(self, f"{side}_mean").copy_(values.mean(dim=0))
            deviation = values.std(dim=0, unbiased=False)
            # A constant scalar carries no information; dividing by its deviation would amplify any later change.
            getattr(self, f"{side}_deviation").copy_(torch.where(deviation < 1e-3, 1.0, deviation))
        if self.config.pieces:
            self.user_pieces.fit(user_scalars)
            self.row_pieces.fit(pin_scalars if similarities is None else torch.cat([pin_scalars, similarities], dim=-1))


def _joined(*columns: Tensor | None) -> Tensor:
    """Return the columns that are given, side by side."""
    given = [one for one in columns if one is not None]
    return given[0] if len(given) == 1 else torch.cat(given, dim=-1)  # not one more operator in the exported network


def _direct(config: NetworkConfig, width: int) -> nn.Linear | None:
    """Return the map past all layers, which at first only knows the product of user and pin; None without inputs."""
    if not width:
        return None
    direct = nn.Linear(width, config.heads, bias=False)
    with torch.no_grad():
        direct.weight.zero_()
        if config.similarities:
            direct.weight[:, 0] = _DIRECT
    return direct


def _encoder(config: NetworkConfig) -> EarlyFusion | LateFusion | CrossFusion | None:
    match config.fusion:
        case "early":
            return EarlyFusion(config)
        case "late":
            return LateFusion(config)
        case "cross":
            return CrossFusion(config)
        case "none":
            return None
