"""Real text that every Python carries, with no download: English prose and Python source, as bytes.

The prose is `pydoc_data.topics`, the language reference as `help()` shows it. The source is the
standard library's own top-level modules. Both differ a little from one Python to the next, so
losses compare within one only.
"""

import hashlib
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCABULARY_SIZE = 256  # A token is a byte.
KINDS = ("prose", "source")


@dataclass(
    frozen=True, eq=False
)  # comparing arrays gives an array, which is neither true nor false
class Text:
    """Byte tokens: `train` is the first nine tenths, `validation` the rest, both memory-mapped
    uint8.
    """

    kind: str
    train: np.memmap
    validation: np.memmap


def load(kind: str = "prose") -> Text:
    """The prose (0.4 MiB or more) or the source (4 MiB or more) that comes with this Python.

    The bytes lie in a file in the user's cache folder (`$XDG_CACHE_HOME/memlab`, or
    `~/.cache/memlab`) and are mapped, so they take no memory of their own.

    Raises ValueError for an unknown kind, RuntimeError when this Python comes without its text, and
    OSError with advice when the cache folder cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, but it is {kind!r}.")
    content = _prose() if kind == "prose" else _source()
    data = np.memmap(_cached(kind, content), dtype=np.uint8, mode="r")
    split = len(data) * 9 // 10
    return Text(kind, train=data[:split], validation=data[split:])


def batch(
    data: np.ndarray,
    batch_size: int,
    sequence_length: int,
    *,
    seed: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Random windows of `data` as (tokens, targets), each int64 (batch, sequence).

    The targets are the bytes that follow, one further on than the tokens. The same seed gives the
    same batch on every device. Both tensors own their memory, 8 bytes a token each.

    Raises TypeError for data that are not one row of uint8 and ValueError for a size below 1 or a
    sequence too long for the data, which must hold one byte more.
    """
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        raise TypeError(
            "data must be one row of uint8 in a NumPy array, such as load().train, but it is"
            f" {getattr(data, 'dtype', type(data).__name__)} of shape"
            f" {tuple(getattr(data, 'shape', ()))}."
        )
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, but it is {size}.")
    if len(data) < sequence_length + 1:
        raise ValueError(
            f"A sequence of {sequence_length} needs {sequence_length + 1} bytes of data, "
            f"but there are {len(data)}: shorten sequence_length."
        )
    # Drawn on the CPU whatever the device, since each kind of device has random numbers of its own.
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - sequence_length, (batch_size,), generator=generator).tolist()
    # Filled row by row and not wrapped around a NumPy array, so that the memory is from torch's
    # allocator, where a meter sees it.
    tokens = torch.empty(batch_size, sequence_length, dtype=torch.int64)
    targets = torch.empty_like(tokens)
    for row, start in enumerate(starts):
        window = torch.from_numpy(np.array(data[start : start + sequence_length + 1]))
        tokens[row] = window[:-1]
        targets[row] = window[1:]
    return tokens.to(device), targets.to(device)


def decode(tokens: Tensor | np.ndarray | bytes) -> str:
    """The text of one row of byte tokens; bytes that are no UTF-8 become U+FFFD.

    Raises TypeError for tokens that are not integers, ValueError for more than one row or a token
    over 255.
    """
    if isinstance(tokens, bytes):
        return tokens.decode(errors="replace")
    row = np.asarray(tokens.detach().cpu() if isinstance(tokens, Tensor) else tokens)
    if not np.issubdtype(row.dtype, np.integer):
        raise TypeError(f"tokens must be integers, but they are {row.dtype}.")
    if row.ndim != 1:
        raise ValueError(
            f"tokens must be one row, but the shape is {row.shape}: decode one row at a time."
        )
    if row.size and not 0 <= row.min() <= row.max() < VOCABULARY_SIZE:
        raise ValueError(
            f"tokens must be bytes, 0 to 255, but they run from {row.min()} to {row.max()}."
        )
    return row.astype(np.uint8).tobytes().decode(errors="replace")


def _prose() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            'This Python comes without pydoc_data, which holds the prose: use load("source").'
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _source() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    # Only modules of the standard library proper: the folder can also hold a machine's build
    # settings.
    files = [file for file in sorted(folder.glob("*.py")) if file.stem in sys.stdlib_module_names]
    if not files:
        raise RuntimeError(
            f"This Python comes without the source of its standard library in {folder}: use"
            ' load("prose").'
        )
    return b"\n".join(file.read_bytes() for file in files)


def _cached(kind: str, content: bytes) -> Path:
    """The cache file with this content, written if it is not there."""
    # XDG: a path that is not absolute is to be ignored.
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "memlab"
    # The name holds the content's hash: other content has another name, and a damaged file is
    # written anew.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    path = folder / f"{kind}-python{version}-{hashlib.sha256(content).hexdigest()[:16]}.bin"
    try:
        if path.is_file() and path.read_bytes() == content:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside and moved: another process sees the whole file or none, and one that has
        # mapped the old file keeps it.
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f"{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OSError(
            f"The text could not be written to the cache folder {folder} ({error}): "
            "set XDG_CACHE_HOME to a folder that you can write to."
        ) from error
    return path
