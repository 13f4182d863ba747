"""Who holds what steps leave behind, asked while the loop runs: after it its variables are gone.

A script's loop mostly stands in a function. When that returns, nobody knows any more that a list in
it held a tensor of each step.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from memlab.holders import Holder, find_holders
from memlab.meters.live import live_storages

#: The step from which on it looks for the first time; the next time after four times as many.
_FIRST = 2


class Leftovers:
    """Looks, inside its `with` block, for what is made in one step and still there two later.

    Each look walks through the objects of the process, so there are few: from steps 2, 8, 32 on,
    and so forth, until something is found.

    Args:
        device: whose tensors.

    Attributes:
        holders: who held what was found, with how many entries then.
    """

    def __init__(self, device: torch.device):
        self.holders: list[Holder] = []
        self._device = device
        self._steps = 0
        self._begins = _FIRST
        self._before: set[int] = set()
        self._made: list[weakref.ref] = []

    def __enter__(self) -> Leftovers:
        self._hook = register_optimizer_step_post_hook(lambda *call: self._step_ended())
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _step_ended(self) -> None:
        self._steps += 1
        if self.holders:
            return
        if self._steps == self._begins:
            self._before = set(live_storages(self._device))
        elif self._steps == self._begins + 1:
            found = live_storages(self._device)
            self._made = [weakref.ref(found[place]) for place in found.keys() - self._before]
        elif self._steps == self._begins + 3:
            self._begins *= 4
            left = [storage for made in self._made if (storage := made()) is not None]
            addresses = [storage.data_ptr() for storage in left]
            del left
            if addresses:
                found = find_holders(addresses, device=self._device)
                self.holders = [_as_of(holder, self._steps) for holder in found]


def _as_of(holder: Holder, step: int) -> Holder:
    """Say of which step a number of entries is: it may have grown since."""
    path = holder.path.replace(" entries)", f" entries after step {step})")
    return dataclasses.replace(holder, path=path)
