"""Decisions that rank 0 makes for all ranks, once the preflight has connected them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode

T = TypeVar("T")


def decided_by_first(rank_info: RankInfo, decide: Callable[[], T]) -> T:
    """What `decide()` returns on rank 0, on all ranks that were started together; a collective call.

    Ranks that rank 0 will start, or has started, are not connected yet: there each rank decides for itself.

    Args:
        rank_info: of this rank.
        decide: called on rank 0 only; its result can be pickled.

    Raises:
        UserError: that of `decide`, on rank 0; the other ranks raise SystemExit with the same exit code.
    """
    if rank_info.ranks == 1:
        return decide()
    answer: list[Any] = [False, None]
    if not rank_info.first:
        dist.broadcast_object_list(answer)
        if not answer[0]:
            raise SystemExit(ExitCode.USER_ERROR)
        value: T = answer[1]
        return value
    try:
        value = decide()
    except UserError:
        dist.broadcast_object_list(answer)
        raise
    dist.broadcast_object_list([True, value])
    return value
