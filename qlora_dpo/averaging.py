"""The exponential average of an adapter's weight change, exactly: of the product B A, not of B and of A.

A linear layer computes W x + s B A x. With the reference's change in factors too, alpha s B A + (1 - alpha) B' A' is
[alpha s B, (1 - alpha) B'] [A; A']: stacking the factors averages the products and loses nothing, at the price of rank.
Above a stated rank the product is recompressed to its best approximation of that rank, and the error is kept.
"""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""A `(r, in)` and B `(out, r)` of a weight change B A `(out, in)`."""


def averaged(reference: Factors | None, policy: Factors, alpha: float) -> Factors:
    """Factors of alpha B A + (1 - alpha) B' A'.

    Args:
        reference: Factors of the reference's change; None for no change.
        policy: Factors of the policy's change, its scaling included in B.
        alpha: Share of the policy, in [0, 1].

    Returns:
        Factors of the sum of both ranks; parts that are all zero are left out.
    """
    a, b = policy
    parts = [(a, alpha * b)] + ([] if reference is None else [(reference[0], (1 - alpha) * reference[1])])
    kept = [(a, b) for a, b in parts if bool(b.any())] or parts[:1]
    return torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept], dim=1)


def recompressed(factors: Factors, max_rank: int) -> tuple[Factors, float]:
    """The best approximation of B A of rank `max_rank`, without ever forming the product.

    Args:
        factors: A `(r, in)` and B `(out, r)`.
        max_rank: Largest rank to keep; factors within it come back as they are.

    Returns:
        The factors, and the relative error in the Frobenius norm (0 if nothing was cut).

    Source: Eckart and Young 1936; singular values of B A are those of R_B R_A^T, with B = Q_B R_B and A^T = Q_A R_A.
    """
    a, b = factors
    if a.shape[0] <= max_rank:
        return factors, 0.0
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:max_rank].sqrt()
    kept = (root[:, None] * v[:max_rank]) @ q_a.T, q_b @ (u[:, :max_rank] * root)
    error = (s[max_rank:].norm() / s.norm()).item() if bool(s.any()) else 0.0
    return (kept[0].to(a), kept[1].to(b)), error
