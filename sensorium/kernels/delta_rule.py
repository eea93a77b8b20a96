"""The gated delta rule: linear attention whose state decays, and is updated by its prediction error.

A head's state `S` is a matrix that maps keys to values. A token with key `k`, value `v`, decay `g <= 0` and rate `beta`
updates it, and its query `q` reads it:

    S <- exp(g) S;    S <- S + k (beta (v - k S));    output = q S

`q` and `k` have length one, and `q` is divided by the square root of its width. Everything is computed in float32.

Source: Yang et al. 2024, "Gated Delta Networks", section 3; `transformers` `torch_recurrent_gated_delta_rule`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

CHUNK = 64
"""Tokens that are computed at once."""
_EPSILON = 1e-6


def gated_delta_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance each sequence by one token.

    Args:
        query: `(S, H, D)`.
        key: `(S, H, D)`.
        value: `(S, H, Dv)`.
        decay: `(S, H)` float32, logarithms.
        rate: `(S, H)`.
        state: `(S, H, D, Dv)` float32, before the tokens.

    Returns:
        The outputs `(S, H, Dv)` in the query's dtype, and the states after the tokens.
    """
    query, key, out_dtype = _unit(query) * query.shape[-1] ** -0.5, _unit(key), query.dtype
    state = state * decay.exp()[..., None, None]
    known = (key[..., None, :] @ state).squeeze(-2)
    correction = (value.float() - known) * rate.float()[..., None]
    state = state + key[..., :, None] * correction[..., None, :]
    return (query[..., None, :] @ state).squeeze(-2).to(out_dtype), state


def gated_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance one sequence by many tokens: the result of `gated_delta_step`, with a few matrix products per `CHUNK`
    tokens.

    Within a chunk, the update of each token depends on those before it. Together they solve one triangular system,
    `(I + A) U = beta (V - exp(G) K S)`, where `A[i, j] = beta_i exp(G_i - G_j) k_i k_j` for `j < i` and `G` sums the
    decays up to a token. It is linear in the state `S` before the chunk, so the systems of all chunks are solved at
    once, and only the states are computed one after the other.

    Args:
        query: `(T, H, D)`.
        key: `(T, H, D)`.
        value: `(T, H, Dv)`.
        decay: `(T, H)` float32, logarithms.
        rate: `(T, H)`.
        state: `(H, D, Dv)` float32, before the tokens.

    Returns:
        The outputs `(T, H, Dv)` in the query's dtype, and the state after the tokens.
    """
    num_tokens, out_dtype = len(query), query.dtype
    length = min(CHUNK, num_tokens)
    # Padding tokens of zeros don't change the state.
    q = _in_chunks(_unit(query) * query.shape[-1] ** -0.5, length)
    k, v = _in_chunks(_unit(key), length), _in_chunks(value.float(), length)
    beta = _in_chunks(rate.float()[..., None], length)
    total = _in_chunks(decay[..., None], length).cumsum(dim=2)
    # exp(G_i - G_j) for j <= i, and 0 elsewhere. The difference is masked first: it could overflow.
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    fading = (total - total.transpose(2, 3)).masked_fill(later, float("-inf")).exp()
    system = (beta * k) @ k.transpose(2, 3) * fading
    learnt = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
    recalled = torch.linalg.solve_triangular(system, beta * total.exp() * k, upper=False, unitriangular=True)
    within = q @ k.transpose(2, 3) * fading
    from_before = q * total.exp()
    end = total[:, :, -1:]
    to_end = (k * (end - total).exp()).transpose(2, 3)
    out = torch.empty_like(learnt)
    for i in range(q.shape[1]):
        corrections = learnt[:, i] - recalled[:, i] @ state
        out[:, i] = from_before[:, i] @ state + within[:, i] @ corrections
        state = state * end[:, i].exp() + to_end[:, i] @ corrections
    return out.flatten(1, 2)[:, :num_tokens].transpose(0, 1).to(out_dtype), state


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length one, in float32."""
    wide = vectors.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _EPSILON)


def _in_chunks(rows: torch.Tensor, length: int) -> torch.Tensor:
    """`(T, H, n)` to `(H, chunks, length, n)`, filled up with zeros."""
    missing = -len(rows) % length
    padded = pad(rows, (0, 0, 0, 0, 0, missing)).transpose(0, 1)
    return padded.reshape(len(padded), -1, length, rows.shape[2])
