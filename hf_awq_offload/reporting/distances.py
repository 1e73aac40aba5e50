"""Running sums of how far a model's predictions are from a text, and from those of another model.

    nll   = -log p(target)                        perplexity = exp(mean nll)
    KL    = Σ_v q_v (log q_v - log p_v)           q: the reference, p: the model; in nats per token
    top-1 = share of tokens with argmax p = argmax q

Logits come in blocks of rows, as large as the caller has room for: nothing here depends on how the rows are grouped,
but for the order of sums. Log-probabilities are in fp32, sums in fp64. Rows are also counted by their position, because
a model that has lost something often loses more of it the longer the text before a token is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import NumericalError

BUCKET_STARTS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where each bucket of positions begins; a position is the number of tokens before the predicted one."""
BLOCK_BYTES = 64 << 20
"""Room for the temporaries of a block of rows."""
BLOCK_COPIES = 6
"""fp32 tensors of the size of a block's logits: two models' logits and log-probabilities, and the terms of the KL."""


@dataclass(frozen=True)
class PositionBucket:
    """Means over the tokens that have about as many tokens before them."""

    first: int  # fewest tokens before the predicted one
    last: int | None  # most of them; None in the last bucket, which has no end
    tokens: int
    perplexity: float
    reference_perplexity: float | None
    kl_nats: float | None
    top1_agreement: float | None


@dataclass
class _Sums:
    tokens: int = 0
    nll_nats: float = 0.0
    reference_nll_nats: float = 0.0
    kl_nats: float = 0.0
    agreed: int = 0

    def add(self, terms: Tensor) -> None:
        """Adds rows of terms, (rows, 4): nll, nll of the reference, KL, agreement."""
        sums = terms.double().sum(0).tolist()
        self.tokens += len(terms)
        self.nll_nats += sums[0]
        self.reference_nll_nats += sums[1]
        self.kl_nats += sums[2]
        self.agreed += round(sums[3])


class Distances:
    """Sums up what is measured, block by block.

    Args:
        has_reference: whether there is another model to compare with.
    """

    def __init__(self, has_reference: bool):
        self.has_reference = has_reference
        self._buckets = [_Sums() for _ in BUCKET_STARTS]

    def add(
        self,
        logits: Tensor,  # (rows, vocabulary)
        reference_logits: Tensor | None,  # (rows, vocabulary) on any device
        targets: Tensor,  # (rows,) int64: the token that follows
        positions: Tensor,  # (rows,) int64: the number of tokens before it
    ) -> None:
        """Adds a block of rows.

        Raises:
            NumericalError: logits are not a number.
        """
        targets = targets.to(logits.device)
        log_p = _log_probabilities(logits, "the model")
        nothing = torch.zeros(len(logits), device=logits.device)
        reference_nll = kl = agreed = nothing
        if reference_logits is not None:
            log_q = _log_probabilities(reference_logits.to(logits.device), "the model that it is compared with")
            reference_nll = F.nll_loss(log_q, targets, reduction="none")
            agreed = (log_p.argmax(-1) == log_q.argmax(-1)).float()
            # Where both models rule a token out (-inf), the difference is no number; its weight is zero.
            kl = (log_q.exp() * (log_q - log_p)).nan_to_num_(nan=0.0, posinf=math.inf).sum(-1)
        terms = torch.stack([F.nll_loss(log_p, targets, reduction="none"), reference_nll, kl, agreed], -1).cpu()
        buckets = torch.tensor([bisect_right(BUCKET_STARTS, position) - 1 for position in positions.tolist()])
        for bucket in buckets.unique().tolist():
            self._buckets[max(0, bucket)].add(terms[buckets == bucket])

    @property
    def total(self) -> PositionBucket:
        """Means over all tokens."""
        sums = _Sums()
        for bucket in self._buckets:
            sums = _Sums(*(getattr(sums, name) + getattr(bucket, name) for name in vars(sums)))
        return self._means(sums, BUCKET_STARTS[0], None)

    @property
    def buckets(self) -> tuple[PositionBucket, ...]:
        """Means by position, without buckets that no token fell into."""
        ends = [start - 1 for start in BUCKET_STARTS[1:]]
        found = zip(self._buckets, BUCKET_STARTS, [*ends, None], strict=True)
        return tuple(self._means(sums, first, last) for sums, first, last in found if sums.tokens)

    def _means(self, sums: _Sums, first: int, last: int | None) -> PositionBucket:
        tokens, compared = max(1, sums.tokens), self.has_reference
        return PositionBucket(
            first=first,
            last=last,
            tokens=sums.tokens,
            perplexity=_exp(sums.nll_nats / tokens),
            reference_perplexity=_exp(sums.reference_nll_nats / tokens) if compared else None,
            kl_nats=sums.kl_nats / tokens if compared else None,
            top1_agreement=sums.agreed / tokens if compared else None,
        )


def rows_at_a_time(vocabulary: int) -> int:
    """Returns how many rows of logits a block may have."""
    return max(1, BLOCK_BYTES // (4 * BLOCK_COPIES * vocabulary))


def _log_probabilities(logits: Tensor, whose: str) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    if bool(log_p.isnan().any()):
        raise NumericalError(
            f"The logits of {whose} are not a number on the text at hand. Its weights hold NaN or overflow in its "
            "dtype: `hf-awq-offload inspect` finds such weights; try another dtype (float32)."
        )
    return log_p


def _exp(nats: float) -> float:
    """Returns infinity instead of overflowing, which a broken model's perplexity would do."""
    return math.exp(nats) if nats < 700 else math.inf
