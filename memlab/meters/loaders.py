"""What a data loader returns: the batch, whether or not a module is ever given it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch.utils.data import dataloader

from memlab.meters.listening import method_watched


def batches_shown(show: Callable[[object], None]) -> AbstractContextManager[None]:
    """Inside, show what the iterators of `torch.utils.data.DataLoader` return. So do those of
    accelerate, of Hugging Face's `Trainer` and of Lightning, which are made of them.

    Args:
        show: called with each batch, before the loop has it.
    """
    # An epoch may have begun already, so its iterator is there, and only its class can be changed.
    kind = dataloader._BaseDataLoaderIter
    return method_watched(kind, "__next__", lambda batch, began: show(batch))
