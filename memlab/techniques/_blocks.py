"""Find the repeated blocks of a model: pasted into each technique that needs it, as with
`_patch.py`.
"""

from torch import nn

# --- pasted from _blocks.py: begin ----------------------------------------------------------------


def _find_blocks(model: nn.Module, blocks=None) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by their names.

    None takes all lists of blocks. Those of an encoder and a decoder are two, those of a ResNet or
    a U-Net one for each stage.

    Args:
        model: The model.
        blocks: Modules of the model, or their class. None takes all lists (ModuleList, ModuleDict,
            Sequential) of modules of one class that are not inside such a module. A list of one
            module counts if another list has more of its class.

    Raises:
        TypeError: `model` is no module.
        ValueError: There are no such blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {model!r:.80}.")
    names = {module: name for name, module in model.named_modules()}
    if blocks is None:
        blocks = _repeated(list(names))
    elif isinstance(blocks, type):
        blocks = [module for module in names if isinstance(module, blocks)]
    elif not hasattr(blocks, "__iter__"):
        blocks = []
    blocks = list(dict.fromkeys(blocks))
    if not blocks or any(block not in names for block in blocks):
        raise ValueError(
            f"No blocks found in {type(model).__name__}: pass blocks=, a list of its modules or"
            " their class."
        )
    return {names[block]: block for block in blocks}


def _repeated(modules: list[nn.Module]) -> list[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    lists = {
        module: list(module.children()) for module in modules if isinstance(module, containers)
    }
    lists = {
        container: blocks
        for container, blocks in lists.items()
        if len({type(block) for block in blocks}) == 1
    }
    # What is inside of a block, as its experts, is a part of it.
    inside = {inner for blocks in lists.values() for block in blocks for inner in block.modules()}
    outer = [blocks for container, blocks in lists.items() if container not in inside]

    # A list of PyTorch's own layers, as of output layers, counts only where there is no other.
    of_blocks = [blocks for blocks in outer if not _is_layer(blocks[0])]
    outer = of_blocks or sorted(outer, key=len)[-1:]

    repeated = {type(blocks[0]) for blocks in outer if len(blocks) > 1}
    repeated = repeated or {type(blocks[0]) for blocks in outer}
    return [block for blocks in outer if type(blocks[0]) in repeated for block in blocks]


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.") and not any(module.children())


# --- pasted from _blocks.py: end ------------------------------------------------------------------
