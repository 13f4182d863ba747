"""Which parameters need a gradient and never got one, while others did."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from memlab.units import format_bytes


class Missing(NamedTuple):
    """How many parameters that need a gradient got none, of how many, and their bytes."""

    count: int
    of: int
    bytes: int
    of_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.of} parameters that need a gradient got none"
            f" ({format_bytes(self.bytes)} of {format_bytes(self.of_bytes)})"
        )


class Gradients:
    """Notes parameters, and which of them had a gradient. Keeps none of them alive."""

    def __init__(self) -> None:
        self._parameters: dict[int, weakref.ref] = {}
        self._had: dict[int, weakref.ref] = {}
        self._versions: dict[int, int] = {}

    def note_parameter(self, parameter: torch.Tensor) -> None:
        """Note a parameter, as it is when it is first seen."""
        known = self._parameters.get(id(parameter))
        if known is None or known() is None:  # the id of what is gone is given out again
            self._parameters[id(parameter)] = weakref.ref(parameter)
            self._versions[id(parameter)] = _version(parameter)

    def parameters(self) -> list[torch.Tensor]:
        """Those that still live."""
        alive = (reference() for reference in self._parameters.values())
        return [parameter for parameter in alive if parameter is not None]

    def note(self, parameter: torch.Tensor) -> None:
        """Note that a parameter has a gradient now."""
        self._had[id(parameter)] = weakref.ref(parameter)

    def missing(self) -> Missing | None:
        """What got no gradient among those that still live (None: all or none got one).

        A parameter that was changed has had one: some loops let it go where nobody sees it.
        """
        needing = [parameter for parameter in self.parameters() if parameter.requires_grad]
        without = [parameter for parameter in needing if not self._got(parameter)]
        if not without or len(without) == len(needing):
            return None
        sizes = [sum(p.numel() * p.element_size() for p in group) for group in (without, needing)]
        return Missing(len(without), len(needing), *sizes)

    def _got(self, parameter: torch.Tensor) -> bool:
        known = self._had.get(id(parameter))
        seen = known is not None and known() is parameter
        return seen or _version(parameter) != self._versions.get(id(parameter))


def _version(parameter: torch.Tensor) -> int:
    """How often a parameter was changed in place (0 of one that does not count)."""
    if is_lazy(parameter):  # it is not there yet
        return 0
    return 0 if parameter.is_inference() else parameter._version
