"""Who keeps memory alive: `find_holders`."""

from memlab.holders.block import holders_of_block
from memlab.holders.find import Holder, find_holders

__all__ = ["Holder", "find_holders", "holders_of_block"]
