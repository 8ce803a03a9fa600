"""Multi-head attention, the same for every network here. It has its own file, so that an edit to one network does not
make the others be traced again.
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
