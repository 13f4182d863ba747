"""Which model a module belongs to: the outermost module that holds it, and its name in there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable

import torch
from torch import nn


class Models:
    """The modules that were seen, by name and by model. Keeps none of them alive.

    A model is named by its class and the number of those of that class: `GPT#1`. What two models
    hold together belongs to both: `Actor#1 + Critic#1`.
    """

    def __init__(self) -> None:
        #: Modules by their names in the model that holds them.
        self.names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        #: Those that were called, with their parts.
        self.called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._models: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._labels: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._counts: dict[str, int] = {}

    def of(self, module: nn.Module) -> str:
        """The model of a module ("": not known)."""
        return self._models.get(module, "")

    def find(self, modules: Iterable[nn.Module]) -> None:
        """Find which of all live modules no other one holds, and name what they hold by them."""
        found: dict[nn.Module, dict[str, bool]] = {}
        for root in outermost(modules):
            with contextlib.suppress(Exception):  # these are strangers, half-built ones too
                self._name_parts(root)
                compiled = isinstance(root, torch.fx.GraphModule)
                for part in root.modules():
                    found.setdefault(part, {})[self._label(root)] = compiled
        for part, labels in found.items():
            # What the compiler makes of a model or of an optimizer's step is no model beside it.
            models = [label for label, compiled in labels.items() if not compiled]
            self._models[part] = " + ".join(models or labels)

    def note_called(self, module: nn.Module) -> None:
        """Take a module that was called from outside any other as a model, until more is known."""
        self._name_parts(module)
        for part in module.modules():
            self.called.add(part)
            self._models.setdefault(part, self._label(module))

    def replaced(self) -> frozenset[str]:
        """The names of the modules whose forward was replaced, from outside their class, in the
        models of which something was called.
        """
        called = {self.of(module) for module in self.called}
        modules = [module for module in self._models if self.of(module) in called]
        return frozenset(self.names[module] for module in modules if "forward" in vars(module))

    def evaluating(self) -> bool:
        """Whether all called modules are in eval() mode."""
        modules = list(self.called)
        return bool(modules) and not any(module.training for module in modules)

    def _name_parts(self, root: nn.Module) -> None:
        for name, part in root.named_modules():
            self.names.setdefault(part, name or type(root).__name__)

    def _label(self, root: nn.Module) -> str:
        if root not in self._labels:
            name = type(root).__name__
            self._counts[name] = self._counts.get(name, 0) + 1
            self._labels[root] = f"{name}#{self._counts[name]}"
        return self._labels[root]


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that no other one holds; what the compiler made comes first."""
    modules = list(modules)
    held: set[int] = set()
    for module in modules:
        with contextlib.suppress(Exception):
            held.update(map(id, module.children()))
    found = [module for module in modules if id(module) not in held]
    return sorted(found, key=lambda module: not isinstance(module, torch.fx.GraphModule))
