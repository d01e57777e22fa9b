"""Call the native kernel of the early-fused encoder: fold its weights, lay them out in memory, and run it.

The kernel (`kernels/native/encoding.h`) computes the function `EarlyFusedEncoder` of `kernels.fusion` for one or two
post-norm layers with one head. This file precomputes, in float64, everything that does not depend on a batch:

- The first layer's values are linear in [pin; action]. A basis replaces them: the pin's few dimensions and one column
  per action. The sum over the columns of the actions is the denominator of the softmax.
- Centring the maps before a norm removes its mean in advance. Its gain is folded into the maps after it.
- A row and the input of the feed-forward's first map are sums of the token's, the basis's and the candidate's part. The
  arrays `both_...` hold a part's row and, next to it, what the feed-forward's first map makes of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from kernels.bf16 import pairs
from kernels.engine import EngineError, ShapeError
from kernels.native.library import NativeLibraryError, library, library_if_built

#: What the products of the kernel's layers multiply. Everything else is float32, and so are all sums.
Numbers = Literal["float32", "bf16"]

#: Widths are padded to the widest vector of all instruction sets.
_LANES = 16
LENGTH_MAX = 1024

_SIZES = (
    *("length", "rows", "layers", "actions", "embedding"),
    *("action", "pin", "pin_padded", "own", "own_padded", "candidate", "dim", "dim_padded", "hidden", "basis"),
)
_EPSILONS = ("epsilon1", "epsilon2", "epsilon3", "epsilon4")
_ARRAYS = (
    *("action_table", "pin_map", "pin_bias", "candidate_map", "candidate_bias"),
    *("own_query_key", "own_query_key_bias", "candidate_query_key"),
    *("both_of_basis", "both_of_candidate", "both_bias"),
    *("hidden_of_token", "hidden_bias1"),
    *("gain1", "real", "out_of_hidden1", "out_bias1"),
    *("query_key2", "query_key2_bias", "value_out2", "value_out2_bias", "gain2"),
    *("gain3", "shift3", "hidden_of_row2", "hidden_bias2", "out_of_hidden2", "out_bias2", "gain4", "shift4"),
)
#: The arrays that only products of layers 1 and 2 read. With bf16, they hold pairs of rows.
_IN_PAIRS = ("both_of_basis", "out_of_hidden1", "query_key2", "value_out2", "hidden_of_row2", "out_of_hidden2")


class _Struct(ctypes.Structure):
    """The struct `PinrankEncoder` of encoder.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _SIZES),
        *((name, ctypes.c_float) for name in _EPSILONS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The sizes of an encoder, from the function's attributes and the bundle's inputs."""

    length: int
    rows: int
    layers: int
    epsilon: float = 1e-5


class FusedEncoder:
    """The weights of one encoder in the kernel's layout. Immutable; any number of threads may call `run`."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        shape: EncoderShape,
        isa: str | None = None,
        numbers: Numbers = "float32",
    ) -> None:
        """Fold the weights and lay them out.

        Args:
            weights: float32 arrays, named as in `ranker.network.serving_form.fold_early`.
            shape: sizes of the encoder.
            isa: instruction set to use; None means the widest that this processor supports.
            numbers: what the products multiply. Without an instruction for it, bf16 is computed in many steps.

        Raises:
            EngineError: the kernel is not built, or does not support this shape or instruction set.
        """
        if not serves(shape):
            raise EngineError(f"the kernel supports one or two layers and up to {LENGTH_MAX} actions, not {shape}")
        try:
            self._library = library()
        except NativeLibraryError as error:
            raise EngineError(str(error)) from error
        names = instruction_sets(numbers)
        if isa is not None and isa not in names:
            raise EngineError(f"this processor supports {', '.join(names)}, not {isa}")
        self.isa = isa or names[-1]
        self._isa = names.index(self.isa)
        check_weights(weights, shape)
        self._encode = self._library.pinrank_encode if numbers == "float32" else self._library.pinrank_encode_bf16
        sizes, self._arrays = _fold({name: np.asarray(w, np.float64) for name, w in weights.items()}, shape, numbers)
        self.width = sizes["rows"] * sizes["dim"]
        self._struct = _Struct(**sizes, **dict.fromkeys(_EPSILONS, shape.epsilon))
        for name, array in self._arrays.items():
            setattr(self._struct, name, array.ctypes.data)

    def run(
        self, actions: np.ndarray, embeddings: np.ndarray, candidates: np.ndarray, splits: np.ndarray
    ) -> np.ndarray:
        """Encode every row. The call releases the interpreter lock.

        Args:
            actions: int64[R, L], padded with 0.
            embeddings: float32[R, L, D].
            candidates: float32[N, D].
            splits: int32[R + 1]. Request r owns rows splits[r]:splits[r + 1].

        Returns:
            float32[N, K * d], the concatenated outputs of the K newest actions.

        Raises:
            ShapeError: the arrays do not fit each other or the encoder. The kernel itself checks nothing.
        """
        actions, splits = np.ascontiguousarray(actions, np.int64), np.ascontiguousarray(splits, np.int32)
        embeddings = np.ascontiguousarray(embeddings, np.float32)
        candidates = np.ascontiguousarray(candidates, np.float32)
        requests, length, dim = len(splits) - 1, self._struct.length, self._struct.embedding
        shapes = (actions.shape, embeddings.shape, candidates.shape)
        if shapes != ((requests, length), (requests, length, dim), (len(candidates), dim)):
            raise ShapeError(
                f"expected {requests} requests with sequences of {length} pins of {dim} numbers, got {shapes}"
            )
        if splits[0] != 0 or splits[-1] != len(candidates) or (splits[1:] < splits[:-1]).any():
            raise ShapeError(f"row_splits must rise from 0 to {len(candidates)}, got {splits.tolist()}")
        if actions.size and not 0 <= actions.min() <= actions.max() <= self._struct.actions:
            raise ShapeError(f"actions must be codes from 0 to {self._struct.actions}, got {actions.max()}")
        encoded = np.empty((len(candidates), self.width), np.float32)
        failed = self._encode(
            self._isa,
            ctypes.byref(self._struct),
            *(array.ctypes.data_as(ctypes.c_void_p) for array in (actions, embeddings, candidates, splits)),
            requests,
            encoded.ctypes.data_as(ctypes.c_void_p),
        )
        if failed:
            raise EngineError(f"the kernel failed a run of {len(candidates)} rows with error {failed}")
        return encoded


def serves(shape: EncoderShape) -> bool:
    """Return whether the kernel supports an encoder of this shape."""
    return shape.layers in {1, 2} and 0 < shape.rows <= shape.length <= LENGTH_MAX


@cache
def instruction_sets(numbers: Numbers = "float32") -> tuple[str, ...]:
    """Return the instruction sets that kernel and processor support, widest last; none if the library is not built."""
    loaded = library_if_built()
    if loaded is None:
        return ()
    if numbers == "bf16":
        loaded.pinrank_bf16_isa_name.restype = ctypes.c_char_p
        names = (loaded.pinrank_bf16_isa_name(isa) for isa in (0, 1))
        return tuple(name.decode() for name in names if name)
    loaded.pinrank_isa_name.restype = ctypes.c_char_p
    return tuple(loaded.pinrank_isa_name(isa).decode() for isa in range(loaded.pinrank_isa_widest() + 1))


def has_instruction(numbers: Numbers) -> bool:
    """Return whether this processor multiplies such numbers by an instruction of its own, which the kernel uses."""
    return instruction_sets(numbers)[-1:] not in {(), ("portable",)} or numbers == "float32"


def check_weights(weights: Mapping[str, np.ndarray], shape: EncoderShape) -> None:
    """Raise EngineError if the shapes of the weights are inconsistent: the kernel would read past their end."""
    try:
        (pin, embedding), candidate = weights["acted"].shape, len(weights["candidate"])
        (codes, action), (hidden, dim) = weights["action_table"].shape, weights["layer1_hidden"].shape
        expected: dict[str, tuple[int, ...]] = {
            "action_table": (codes, action),
            "acted": (pin, embedding),
            "acted_bias": (pin,),
            "candidate": (candidate, embedding),
            "candidate_bias": (candidate,),
        }
        for layer in range(1, shape.layers + 1):
            for name, (out, into) in {
                "query_key": (dim, dim),
                "value_out": (dim, dim),
                "hidden": (hidden, dim),
            }.items():
                expected |= {f"layer{layer}_{name}": (out, into), f"layer{layer}_{name}_bias": (out,)}
            expected |= {f"layer{layer}_feed_forward": (dim, hidden), f"layer{layer}_feed_forward_bias": (dim,)}
            for name in ("norm_attention", "norm_out"):
                expected |= {f"layer{layer}_{name}": (dim,), f"layer{layer}_{name}_bias": (dim,)}
        wrong = [name for name, wanted in expected.items() if weights[name].shape != wanted]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"these are not the weights of an encoder: {error!r}") from error
    if wrong or dim != action + pin + candidate or codes < 2:
        raise EngineError(f"the encoder's weights are inconsistent: {wrong or 'token'} with tokens of width {dim}")


def _fold(
    w: Mapping[str, np.ndarray], shape: EncoderShape, numbers: Numbers
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Return the kernel's sizes, and its arrays in float32, padded."""
    sizes = _sizes(w, shape)
    centre = np.eye(sizes["dim"]) - 1.0 / sizes["dim"]
    arrays = _fold_layer1(w, sizes, centre) | (_fold_layer2(w, centre) if shape.layers == 2 else {})
    last = f"layer{shape.layers}_norm_out"
    arrays |= {"gain4": _pad(w[last]), "shift4": _pad(w[f"{last}_bias"])}
    if numbers == "bf16":
        paired = arrays.keys() & set(_IN_PAIRS)
        arrays |= {name: pairs(arrays[name].astype(np.float32)).view(np.float32) for name in paired}
    return sizes, {name: _aligned(array) for name, array in arrays.items()}


def _sizes(w: Mapping[str, np.ndarray], shape: EncoderShape) -> dict[str, int]:
    table, pin, candidate = w["action_table"][1:], len(w["acted"]), len(w["candidate"])
    action = table.shape[1]
    own, dim = action + pin, action + pin + candidate
    return {
        "length": shape.length,
        "rows": shape.rows,
        "layers": shape.layers,
        "actions": len(table),
        "embedding": w["acted"].shape[1],
        "action": action,
        "pin": pin,
        "pin_padded": _up(pin),
        "own": own,
        "own_padded": _up(own),
        "candidate": _up(candidate),
        "dim": dim,
        "dim_padded": _up(dim),
        "hidden": _up(len(w["layer1_hidden"])),
        "basis": pin + len(table),
    }


def _fold_layer1(w: Mapping[str, np.ndarray], sizes: Mapping[str, int], centre: np.ndarray) -> dict[str, np.ndarray]:
    """Fold the token maps and layer 1.

    Rows before the first norm are centred sums of the token's, the basis's and the candidate's part.
    """
    table, candidate = w["action_table"][1:], len(w["candidate"])
    action, own, padded = sizes["action"], sizes["own"], sizes["candidate"]
    gain, shift = w["layer1_norm_attention"], w["layer1_norm_attention_bias"]
    value_out, query_key = w["layer1_value_out"], w["layer1_query_key"]
    of_pin, of_action = value_out[:, action:own].T, table @ value_out[:, :action].T
    of_candidate = value_out[:, own:].T.copy()
    of_candidate[:, own:] += np.eye(candidate)
    to_hidden = (w["layer1_hidden"] * gain).T
    row_of_basis = np.concatenate([of_pin, of_action]) @ centre
    row_of_candidate, row_bias = of_candidate @ centre, centre @ w["layer1_value_out_bias"]

    def both(row: np.ndarray, rows: int | None = None) -> np.ndarray:
        return np.concatenate([_pad(row, rows=rows), _pad(row @ to_hidden, rows=rows)], axis=-1)

    return {
        "action_table": w["action_table"],
        "pin_map": _pad(w["acted"].T, columns=sizes["pin_padded"]),
        "pin_bias": _pad(w["acted_bias"]),
        "candidate_map": _pad(w["candidate"].T, columns=padded),
        "candidate_bias": _pad(w["candidate_bias"]),
        "own_query_key": _pad(query_key[:own, :own].T, columns=sizes["own_padded"]),
        "own_query_key_bias": _pad(w["layer1_query_key_bias"][:own]),
        # The kernel reads this array in blocks of rows, up to a few past the last one.
        "candidate_query_key": _pad(query_key[:own, own:].T, rows=padded + _LANES, columns=own),
        "both_of_basis": both(row_of_basis),
        "both_of_candidate": both(row_of_candidate, rows=padded),
        "both_bias": both(row_bias),
        "hidden_of_token": _pad(to_hidden),
        "hidden_bias1": _pad(w["layer1_hidden"] @ shift + w["layer1_hidden_bias"]),
        "gain1": _pad(gain),
        "real": _pad(np.ones(sizes["dim"])),
        "out_of_hidden1": _pad((centre @ w["layer1_feed_forward"]).T, rows=_up(len(to_hidden.T))),
        "out_bias1": _pad(centre @ (shift + w["layer1_feed_forward_bias"])),
    }


def _fold_layer2(w: Mapping[str, np.ndarray], centre: np.ndarray) -> dict[str, np.ndarray]:
    """Fold layer 2, which reads norm(row) = (row - mean) * scale * gain + shift."""
    gain, shift = w["layer1_norm_out"], w["layer1_norm_out_bias"]
    query_key, value_out = centre @ (gain[:, None] * w["layer2_query_key"]), w["layer2_value_out"]
    return {
        "query_key2": _pad((query_key * gain).T),
        "query_key2_bias": _pad(query_key @ shift + centre @ (gain * w["layer2_query_key_bias"])),
        "value_out2": _pad(centre @ (value_out * gain).T),
        "value_out2_bias": _pad(value_out @ shift + w["layer2_value_out_bias"] + shift),
        "gain2": _pad(gain),
        "gain3": _pad(w["layer2_norm_attention"]),
        "shift3": _pad(w["layer2_norm_attention_bias"]),
        "hidden_of_row2": _pad(w["layer2_hidden"].T),
        "hidden_bias2": _pad(w["layer2_hidden_bias"]),
        "out_of_hidden2": _pad(w["layer2_feed_forward"].T, rows=_up(len(w["layer2_hidden"]))),
        "out_bias2": _pad(w["layer2_feed_forward_bias"]),
    }


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a float32 copy that starts on a cache line: loading a vector across two lines costs twice as much."""
    room = np.empty(array.size + _LANES, np.float32)
    start = -room.ctypes.data // 4 % _LANES
    aligned = room[start : start + array.size].reshape(array.shape)
    aligned[...] = array
    return aligned


def _up(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _pad(array: np.ndarray, rows: int | None = None, columns: int | None = None) -> np.ndarray:
    """Pad an array with zeros to `rows` rows, and to `columns` columns (None: up to whole vectors)."""
    wanted = _up(array.shape[-1]) if columns is None else columns
    widths = [(0, wanted - array.shape[-1])]
    if array.ndim == 2:
        widths.insert(0, (0, (rows or len(array)) - len(array)))
    return np.pad(array, widths)
