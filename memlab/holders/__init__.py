"""Who keeps memory alive: `find_holders`."""

from memlab.holders.find import Holder, find_holders

__all__ = ["Holder", "find_holders"]
