"""Data loading: leave the data set in a file, and bring to the device one batch after the other.

On the device are then the batch in use and a fixed number of batches behind it, whatever the size
of the data set. On the host a memory map takes no memory that the system could not take back, and
workers share it. The price is a copy of every batch over the bus, and a loader that has to keep up
with the device.

`MemoryMappedTokens` is the data set, `ResumableBatches` the order of training, `prefetch` the way
to the device. The first two go into a `torch.utils.data.DataLoader`, whose workers load while the
device computes.

Sources: the notes on memory pinning and on loading in several processes in the documentation of
`torch.utils.data`; PyTorch's issue 13246 on Python objects that are shared with workers; the
memory-mapped data set of Karpathy's nanoGPT (https://github.com/karpathy/nanoGPT).
"""

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.data import Dataset

TOKEN_TYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


class MemoryMappedTokens(Dataset):
    """Windows of a file of token numbers, which is mapped into memory and not read.

    Item i is a tensor (length,) of the file's dtype: a copy of `length` tokens from number i x
    `stride` on. For a language model take `length` = sequence + 1 and `stride` = sequence: the
    targets are one token further on than the inputs. The system reads a page of the file when it is
    first used and drops it when memory is short, and all processes that map the file share its
    pages. The file must not change meanwhile.

    Args:
        path: A file of bare numbers in this machine's byte order, as NumPy's `array.tofile` writes
            it.
        length: Tokens in a window.
        dtype: torch.uint8, uint16, int32 or int64. The smallest type that holds the vocabulary is
            right: 2 bytes a token are enough for 65,536 words.
        stride: Tokens from the start of one window to the start of the next; by default `length`.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Another dtype, or a length or stride that is no int.
        ValueError: A length or stride below 1, or a file that is no whole number of tokens or
            shorter than a window.
        IndexError: From `dataset[i]`, when there is no window i.
    """

    def __init__(
        self, path, length: int, dtype: torch.dtype = torch.uint8, stride: int | None = None
    ):
        stride = length if stride is None else stride
        _check_whole(1, length=length, stride=stride)
        if dtype not in TOKEN_TYPES:
            raise TypeError(
                f"dtype must be one of {', '.join(map(str, TOKEN_TYPES))}, but it is {dtype!r}."
            )
        # Absolute: a worker may have another working directory.
        self.path = os.path.abspath(path)
        self.length = length
        self.dtype = dtype
        self.stride = stride
        if not os.path.isfile(self.path):
            raise FileNotFoundError(
                f"There is no file {self.path}: write the tokens with NumPy's tofile first."
            )
        size = os.path.getsize(self.path)
        token = dtype.itemsize  # bytes
        if size % token or size < length * token:
            raise ValueError(
                f"A file of {dtype} with windows of {length} tokens has a multiple of {token} bytes"
                f" and {length * token} or more, but {self.path} has {size}: is it of another"
                " dtype, or cut off?"
            )
        self.tokens = torch.from_file(self.path, shared=False, size=size // token, dtype=dtype)

    def __len__(self) -> int:
        return (len(self.tokens) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        try:
            start = range(len(self))[index] * self.stride
        except IndexError:
            raise IndexError(
                f"There are {len(self)} windows, and {index} is none of them."
            ) from None
        # A view would take its whole storage along, the file, when a worker sends it.
        return self.tokens[start : start + self.length].clone()

    def __reduce__(self):
        # A process that is started anew, and not forked, maps the file itself: no tokens are sent.
        return type(self), (self.path, self.length, self.dtype, self.stride)


class ResumableBatches:
    """The order of a training run, without end: lists of `batch_size` indices below `length`.

    Each epoch is a permutation of its own. A batch depends on `seed` and its number in the run and
    on nothing else. So the state to save is the number of steps taken, and `start=` that number
    goes on from there, in mid-epoch too. (A sampler that counts what it handed out would be ahead
    of the training by all the batches that workers and a prefetcher have asked for.) Give it to a
    DataLoader as `batch_sampler`; the number of workers changes nothing. What is left of an epoch
    below one batch is left out of it.

    Args:
        length: Of the data set: indices are below it.
        batch_size: Indices in a batch.
        seed: From which the permutations are drawn.
        start: The number of steps taken so far.

    Raises:
        TypeError: A number that is no int.
        ValueError: A length or batch size below 1, a batch larger than the length, or a seed or
            start below 0.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int = 0, start: int = 0):
        _check_whole(1, length=length, batch_size=batch_size)
        _check_whole(0, seed=seed, start=start)
        if batch_size > length:
            raise ValueError(f"A batch of {batch_size} is more than there are indices, {length}.")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        while True:
            # Mixed, so that epoch 1 of seed 0 is not epoch 0 of seed 1. A text is mixed alike
            # everywhere.
            mixed = random.Random(f"{self.seed} {epoch}").getrandbits(32)
            # Stays a tensor, of 4 bytes an index where they are enough: as a list of Python
            # numbers it would be 40.
            dtype = torch.int32 if self.length < 2**31 else torch.int64
            generator = torch.Generator().manual_seed(mixed)
            order = torch.randperm(self.length, dtype=dtype, generator=generator, device="cpu")
            for number in range(position, self.batches_per_epoch):
                yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
            epoch += 1
            position = 0


def prefetch(batches: Iterable, device: torch.device | str, in_flight: int = 1) -> Iterator:
    """Yield batches on a device, with some more of them copied there before they are asked for.

    On the device are at most `in_flight` + 1 batches, beside those that you
    still hold (a `for` loop holds the last one until it has the next). In their own dtype: send
    small numbers, and widen them on the device.

    On CUDA the copies run on a stream of their own, beside the computation, if the batches are in
    pinned memory: `DataLoader(..., pin_memory=True)`. From other memory each copy makes the host
    wait. Use a batch in the stream that is current when the first one is asked for. Elsewhere a
    copy is made where it is asked for.

    The loader's workers end with the iterator: exhaust it, close it, or let it go. An error of the
    loader comes through when it occurs, up to `in_flight` batches before its turn.

    Args:
        batches: A DataLoader or another iterable. A batch is a tensor, or tuples, lists and dicts
            with tensors in them, of any shape; the rest is passed on as it is.
        device: Where the batches go.
        in_flight: How many are copied ahead.

    Returns:
        An iterator over the batches.

    Raises:
        TypeError: An `in_flight` that is no int, or batches that cannot be iterated.
        ValueError: An `in_flight` below 0.
        RuntimeError: The current CUDA stream has changed.
    """
    _check_whole(0, in_flight=in_flight)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a DataLoader or another iterable, but it is {batches!r:.80}."
        )
    return _prefetch(iter(batches), torch.device(device), in_flight)


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory, from where a GPU can fetch it beside the computation.

    Without a GPU there is nothing to pin for: the tensor comes back as it is.

    Args:
        tensor: In the host's memory, of any shape.
    """
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _prefetch(source: Iterator, device: torch.device, in_flight: int) -> Iterator:
    cuda = device.type == "cuda"
    compute = torch.cuda.current_stream(device) if cuda else None
    copies = torch.cuda.Stream(device) if cuda else None
    waiting = deque()

    def copy(tensor: Tensor) -> Tensor:
        # The memory is taken and given back in the compute stream's order, and the copy waits for
        # that stream: so nothing that is still computing uses it, and the bound on what is alive
        # holds on the device too.
        there = torch.empty_like(tensor, device=device)
        if cuda:
            copies.wait_stream(compute)
        with torch.cuda.stream(copies) if cuda else nullcontext():
            return there.copy_(tensor, non_blocking=cuda)

    try:
        for batch in source:
            if cuda and torch.cuda.current_stream(device) != compute:
                raise RuntimeError(
                    "The CUDA stream has changed since the first batch: stay in one stream."
                )
            waiting.append((_each(copy, batch), copies.record_event() if cuda else None))
            del batch  # the host's copy
            if len(waiting) > in_flight:
                yield _arrived(waiting, compute)
        while waiting:
            yield _arrived(waiting, compute)
    finally:
        if cuda:
            compute.wait_stream(copies)  # a copy may still be running into what is given back now
        waiting.clear()


def _arrived(waiting: deque, compute):
    """The oldest batch, and no name for it here: the generator would hold it while the caller uses
    it up.
    """
    batch, event = waiting.popleft()
    if event is not None:
        compute.wait_event(event)
    return batch


def _each(function: Callable[[Tensor], Tensor], batch):
    """The batch with `function` applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _each(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [_each(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _check_whole(least: int, **numbers) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, but it is {number!r}.")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, but it is {number}.")
