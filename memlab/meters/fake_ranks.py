"""One rank of many, without the others: a process group whose collectives move nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch.distributed

from memlab.meters.fake import Shapes


@contextlib.contextmanager
def fake_ranks(count: int | None) -> Iterator[None]:
    """Inside, this process is rank 0 of `count` (None: no process group).

    It is PyTorch's own process group for tests, "fake". What a run calls to join one
    (`torch.distributed.init_process_group`) finds it made already.

    Args:
        count: how many ranks.

    Raises:
        ValueError: this process is in a process group already, or PyTorch has none.
    """
    if count is None:
        yield
        return
    if not torch.distributed.is_available():
        raise ValueError("this build of PyTorch has no torch.distributed: ranks= needs it")
    if torch.distributed.is_initialized():
        raise ValueError(
            "this process is in a process group already. Predict ranks= in a process of its own, or"
            " call torch.distributed.destroy_process_group() first."
        )
    # The import makes the backend known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed = torch.distributed
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count)}
    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    leave = distributed.destroy_process_group
    try:
        with (
            mock.patch.dict(os.environ, {**told, "LOCAL_WORLD_SIZE": str(count)}),
            mock.patch.object(distributed, "init_process_group", _nothing),
            mock.patch.object(distributed, "destroy_process_group", _nothing),
        ):
            yield
    finally:
        leave()


@contextlib.contextmanager
def whole_shapes_set_aside(shapes: Shapes) -> Iterator[None]:
    """Inside, what DTensor tries on whole shapes is no part of a run on fake tensors.

    To learn the shape of an operator's result, DTensor calls the operator once on fake tensors that
    are as large as all slices together. On a GPU these have no bytes. In a run on fake tensors they
    would look like the run's own: 16 bytes a parameter, for a fused AdamW.

    Args:
        shapes: what notes the run's storages.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    class Lock:
        """DTensor enters its lock around these calls, and around nothing else."""

        def __enter__(self) -> None:
            shapes.set_aside = True

        def __exit__(self, *error: object) -> None:
            shapes.set_aside = False

    with mock.patch.object(ShardingPropagator, "_fake_mode_lock", Lock(), create=True):
        yield


def _nothing(*arguments: object, **keywords: object) -> None:
    return None
