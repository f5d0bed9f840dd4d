"""Masks of many clients as bitmaps: one bit a coordinate, the first in the highest bit, as ``Mask.to_bytes`` packs.

Shapes: ``N`` masks, ``P`` coordinates, ``B`` = ceil(P / 8) bytes of a mask.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsparse.core.space import ParamSpace
from fedsparse.masks.mask import Mask


def pack(mask: Tensor) -> Tensor:
    """Pack one mask: bool (P,) -> uint8 (B,), on the CPU.

    >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True]))
    tensor([129, 128], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bitmaps: Tensor, size: int) -> Tensor:
    """Read masks where they are: uint8 (N, B) -> bool (N, P).

    >>> unpack(torch.tensor([[129, 128]], dtype=torch.uint8), 9).long()
    tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]])
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bitmaps.device)
    bits = (bitmaps.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :size].bool()


def masks_of(bitmaps: Tensor, space: ParamSpace) -> list[Mask]:
    """Unpack the masks of all clients one after the other, for comparison: uint8 (N, B) -> N masks."""
    return [Mask.of(space, unpack(bitmap.unsqueeze(0), space.size)[0]) for bitmap in bitmaps.cpu()]
