"""Copies of small values from the device to the host that do not make the host wait."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class AsyncHostCopy:
    """Starts a copy of values to the host; `values` waits for it, nothing else does.

    Args:
        values: scalars and tensors of one or two dimensions, by key.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.shapes = {key: tuple(value.shape) for key, value in values.items()}
        found = [value.detach() for value in values.values()]
        scalars = all(value.dim() == 0 and value.dtype == torch.float32 for value in found)
        flat = torch.stack(found) if scalars else torch.cat([value.reshape(-1).float() for value in found])
        self._copied: Any = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = flat

    def values(self) -> dict[str, Any]:
        """By key a number, a list of numbers, or a list of lists; waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        flat, found, offset = self._host.numpy().tolist(), {}, 0
        for key, shape in self.shapes.items():
            size = math.prod(shape)
            part = flat[offset : offset + size]
            found[key] = part[0] if not shape else part
            if len(shape) == 2:
                found[key] = [part[first : first + shape[1]] for first in range(0, size, shape[1])]
            offset += size
        return found
