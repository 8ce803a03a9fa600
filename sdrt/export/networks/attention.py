"""Multi-head attention as every network here does it. A file of its own, so that an edit to one network does not trace
the others again.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """Multi-head attention over `[B, L, C]` queries and `[B, T, C]` keys and values, `C` split into `heads`. Returns
    `[B, L, C]`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
