"""torch's own kernels for attention, and what each of them takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from latent_thoughts.attention.rule import Rule

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn: Any = None

HALF = (torch.bfloat16, torch.float16)
VARLEN = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()  # what it can be told
# torch 2.11 takes several queries of a key-value head as they come, later versions where they are told to
GROUPED = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}


def fused(q_BHTD: Any, k_BJKD: Any, v_BJKD: Any, mask: torch.Tensor | None, rule: Rule) -> torch.Tensor:
    """Attention of rectangles; without a mask it is causal.

    On GPUs flash attention alone knows several queries of a key-value head, and takes neither masks nor float32; all
    else would be done by plain products. So for its neighbour keys and values are repeated.
    """
    each, flash = q_BHTD.shape[1] // k_BJKD.shape[1], mask is None and q_BHTD.dtype in HALF
    flash = flash and q_BHTD.shape[3] == v_BJKD.shape[3] <= 256
    if q_BHTD.device.type == "cuda" and each > 1 and not flash:
        k_BJKD, v_BJKD, each = k_BJKD.repeat_interleave(each, 1), v_BJKD.repeat_interleave(each, 1), 1
    return functional.scaled_dot_product_attention(
        q_BHTD, k_BJKD, v_BJKD, mask, rule.dropout, mask is None, scale=rule.scaling, enable_gqa=each > 1
    )


def rows_fit(q_HND: torch.Tensor, v_JND: torch.Tensor, rule: Rule) -> bool:
    """Whether flash attention over rows takes them."""
    width = q_HND.shape[2]
    fit = q_HND.dtype in HALF and width == v_JND.shape[2] <= 256 and width % 8 == 0
    return fit and rule.plain and has_flash(q_HND.device)


def has_flash(device: torch.device) -> bool:
    """Whether there is flash attention over rows, of this torch and on this device."""
    if device.type != "cuda" or not {"scale", "window_size"} <= VARLEN:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def ends(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where a row's parts end, from 0 on, as flash attention wants it."""
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)


def over_rows(
    q_NHD: torch.Tensor,
    k_MJD: torch.Tensor,
    v_MJD: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    rule: Rule,
) -> torch.Tensor:
    """Flash attention over rows, of queries and of keys, whose parts belong together one by one; (H, N, D).

    A part's last query stands at its last key: what a part has more of keys comes before its queries. `longest` are
    bounds of their sizes.
    """
    window = ((rule.window or 0) - 1, 0)  # how far back besides itself; -1: to the start
    out = varlen_attn(q_NHD, k_MJD, v_MJD, *ends, *longest, scale=rule.scaling, window_size=window, **GROUPED)
    return out.transpose(0, 1)
