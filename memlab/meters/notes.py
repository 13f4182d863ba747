"""A list of observations that the garbage collector does not see."""

from __future__ import annotations

from memlab.ledger import Observation


class Notes:
    """Observations, kept in plain lists of their fields.

    A tuple for each would be an object that Python's garbage collector counts: it would run more
    often, and free cycles that the run itself keeps.
    """

    def __init__(self) -> None:
        self._times: list[int] = []
        self._addresses: list[int] = []
        self._columns: list[str] = []
        self._names: list[str] = []
        self._kinds: list[tuple] = []  # (dtype, shape, model, role)
        self._known: dict[tuple, tuple] = {}  # so that equal ones are one object

    def add(self, time: int, address: int, column: str, name: str, kind: tuple) -> None:
        """Note the fields of one observation; `kind` are those from the dtype on."""
        self._times.append(time)
        self._addresses.append(address)
        self._columns.append(column)
        self._names.append(name)
        self._kinds.append(self._known.setdefault(kind, kind))

    def observations(self) -> list[Observation]:
        """All of them, in their order."""
        seen = zip(self._times, self._addresses, self._columns, self._names, strict=True)
        both = zip(seen, self._kinds, strict=True)
        return [Observation(*what, *kind) for what, kind in both]
