"""What a technique was applied to and the run never called."""

from __future__ import annotations

from collections.abc import Collection


def never_called(replaced: Collection[str], ran: Collection[str]) -> tuple[str, ...]:
    """Return the modules that never ran, although others beside them did.

    (Of a compiled model only the whole is seen to run.)

    Args:
        replaced: the names of the modules whose forward was replaced.
        ran: the names of all that ran, the model itself by that of its class.
    """
    found = []
    for name in sorted(set(replaced) - set(ran)):
        holder = name.rpartition(".")[0]
        beside = [other for other in ran if other.startswith(f"{holder}." if holder else "")]
        if len(beside) > (not holder):  # at the top, one of them is the model itself
            found.append(name)
    return tuple(found)
