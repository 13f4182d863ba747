"""A receipt: what a run needed, in a file that is kept, and compared with that of a later run.

    measure(train).save("receipt.json")                          # once, and commit the file
    python -m memlab diff receipt.json new.json --at-most 1%     # exit status 1 if it grew

What is compared is `known_bytes`: exact, and the same on any processor. So a test of memory needs
no GPU.
"""

from memlab.receipt.difference import Difference, diff
from memlab.receipt.models import Group, Receipt, Said, groups, load, name_largest, step_peaks

__all__ = [
    "Difference",
    "Group",
    "Receipt",
    "Said",
    "diff",
    "groups",
    "load",
    "name_largest",
    "step_peaks",
]
