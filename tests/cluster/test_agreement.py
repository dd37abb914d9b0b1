"""What rank 0 decides for all ranks: the same answer everywhere, and one end where rank 0 refuses."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from rwkv_train.cluster.agreement import decided_by_first
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.errors import UserError


class Group:
    """The broadcasts of rank 0, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[object]] = []
        monkeypatch.setattr(dist, "broadcast_object_list", self.broadcast)
        self.sends = True

    def broadcast(self, objects: list[object]) -> None:
        if self.sends:
            self.sent.append(list(objects))
        else:
            objects[:] = self.sent.pop(0)


def never() -> int:
    raise AssertionError("only rank 0 decides")


def refuse() -> int:
    raise UserError("all checkpoints are damaged")


def test_rank_0_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    assert decided_by_first(RankInfo(rank=0, ranks=2), lambda: 7) == 7
    group.sends = False
    assert decided_by_first(RankInfo(rank=1, ranks=2), never) == 7


def test_an_error_of_rank_0_ends_all_ranks_with_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    with pytest.raises(UserError, match="damaged"):
        decided_by_first(RankInfo(rank=0, ranks=2), refuse)
    group.sends = False
    with pytest.raises(SystemExit) as caught:
        decided_by_first(RankInfo(rank=1, ranks=2), never)
    assert caught.value.code == 2


def test_ranks_that_are_not_connected_decide_alone() -> None:
    assert decided_by_first(RankInfo(), lambda: 7) == 7
    assert decided_by_first(RankInfo(rank=1, local_rank=1, parent=7), lambda: 8) == 8
