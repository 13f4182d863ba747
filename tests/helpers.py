"""What the tests of several modules need: small models and their runs, and how far numbers are
apart.
"""

import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

from memlab.workloads import gpt


def equal(tensors, others):
    """Whether two lists of tensors are the same, bit for bit."""
    tensors = list(tensors)
    others = list(others)
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def largest_difference(tensors, others):
    """The largest difference between two lists of tensors, relative to the largest number in each
    of `others`. Two tensors may be given as they are.
    """
    if isinstance(tensors, torch.Tensor):
        tensors = [tensors]
        others = [others]
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(tensors, others, strict=True)]
    assert pairs and all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def numbers_of(model):
    """All of them, with the buffers that are never saved."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def is_far(tensor):
    """Whether a tensor lies where the optimizer's far state does: in pinned memory or in a file."""
    return tensor.is_pinned() or tensor.untyped_storage().filename is not None


def saved_bytes(run, exclude=()):
    """Bytes that autograd saves for backward in `run`, by storage, without those of `exclude` and,
    where `run` returns a tensor, of its result.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(size for size, _ in storages.values())


def global_hooks():
    """How many of each of PyTorch's global hooks are set: what a meter has to take off again."""
    return {
        name: len(registry)
        for place in (modules, optimizers)
        for name, registry in vars(place).items()
        if name.startswith("_global") and isinstance(registry, dict) and registry
    }


def small_gpt(**changes):
    """A seeded GPT of two layers and 500 words."""
    torch.manual_seed(0)
    return gpt.GPT(gpt.tiny(**{"layers": 2, "vocabulary_size": 500} | changes))


def run_gpt(model):
    """Its loss on a seeded batch, of which five targets are ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(model.config.vocabulary_size, (2, 2, 24), generator=generator)
    targets[0, :5] = -100
    return model(tokens, targets)


def run_hugging_face(model):
    """A Hugging Face model's loss on a seeded batch, of which the first four targets of each row
    are ignored, as those of a prompt.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 20), generator=generator)
    labels = tokens.clone()
    labels[:, :4] = -100
    return model(input_ids=tokens, labels=labels, use_cache=False).loss
