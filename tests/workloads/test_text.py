import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memlab.workloads import text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "memlab"


def joined(loaded):
    return loaded.train.tobytes() + loaded.validation.tobytes()


@pytest.mark.parametrize("kind, at_least", [("prose", 400_000), ("source", 3_000_000)])
def test_load_maps_real_text(kind, at_least, cache):
    loaded = text.load(kind)
    assert loaded.kind == kind
    for part in (loaded.train, loaded.validation):
        assert isinstance(part, np.memmap)
        assert part.dtype == np.uint8 and part.ndim == 1
        assert not part.flags.writeable
    size = len(loaded.train) + len(loaded.validation)
    assert size >= at_least
    assert len(loaded.train) == size * 9 // 10
    (file,) = cache.iterdir()
    assert file.read_bytes() == joined(loaded)


def test_prose_is_english_and_source_is_python():
    prose, source = joined(text.load("prose")).decode(), joined(text.load("source")).decode()
    assert "Assert statements are a convenient way" in prose
    assert prose.count(" the ") > 3000
    assert source.count("\ndef ") > 1000
    assert "class Fraction(numbers.Rational)" in source


def test_source_leaves_out_what_is_not_the_standard_library(tmp_path, monkeypatch):
    """The folder can also hold the machine's build settings, under a name of their own."""
    (tmp_path / "abc.py").write_text("first")
    (tmp_path / "zipapp.py").write_text("last")
    (tmp_path / "_sysconfigdata__linux_x86_64.py").write_text("a path")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert joined(text.load("source")) == b"first\nlast"


def test_load_is_deterministic_and_prose_is_the_default():
    assert joined(text.load()) == joined(text.load("prose"))
    assert joined(text.load("source")) == joined(text.load("source"))


def test_second_load_does_not_write(cache):
    text.load("prose")
    (file,) = cache.iterdir()
    before = file.stat()
    text.load("prose")
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_file_cut_short_is_written_anew(cache):
    whole = joined(text.load("prose"))
    (file,) = cache.iterdir()
    file.write_bytes(whole[:1000])
    assert joined(text.load("prose")) == whole
    assert list(cache.iterdir()) == [file]


def test_other_content_goes_to_another_file(cache, monkeypatch):
    old = text.load("prose")
    whole = joined(old)
    monkeypatch.setattr(text, "_prose", lambda: b"another version of Python")
    assert joined(text.load("prose")) == b"another version of Python"
    assert len(list(cache.iterdir())) == 2
    assert joined(old) == whole
    assert all(
        f"python{sys.version_info.major}.{sys.version_info.minor}-" in file.name
        for file in cache.iterdir()
    )


def test_the_file_appears_whole(cache, monkeypatch):
    moves = []
    replace = text.os.replace

    def look(source, target):
        moves.append((Path(source).parent, Path(source).read_bytes(), target.exists()))
        replace(source, target)

    monkeypatch.setattr(text.os, "replace", look)
    content = joined(text.load("prose"))
    # Complete before it has its name, and in the same folder, where a move is atomic.
    assert moves == [(cache, content, False)]


def test_a_failed_write_leaves_nothing_behind(cache, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(text.os, "replace", fail)
    with pytest.raises(OSError, match="no space left.*XDG_CACHE_HOME"):
        text.load("prose")
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        text.load("prose")


@pytest.mark.parametrize("value", [None, "", "relative/folder"])
def test_without_an_absolute_xdg_cache_home_the_cache_is_in_the_home_folder(
    value, tmp_path, monkeypatch
):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text.load("prose")
    assert len(list((tmp_path / "home" / ".cache" / "memlab").iterdir())) == 1


def test_processes_at_the_same_time_do_not_race(cache):
    program = (
        "import sys; from memlab.workloads import text\n"
        "sys.stdin.readline()\n"  # all have imported; they start together
        "print(sum(len(text.load(kind).train) for kind in text.KINDS for _ in range(5)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=1200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    expected = 5 * sum(len(text.load(kind).train) for kind in text.KINDS)
    assert {int(output) for output, _ in results} == {expected}
    # One whole file a kind, and nothing half-written beside them.
    assert sorted(file.name.split("-")[0] for file in cache.iterdir()) == ["prose", "source"]
    assert all(file.suffix == ".bin" for file in cache.iterdir())


def test_a_python_without_its_text_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match=r'use load\("prose"\)'):
        text.load("source")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match=r'use load\("source"\)'):
        text.load("prose")


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="prose, source.*poems"):
        text.load("poems")


DATA = np.arange(256, dtype=np.uint8)


def test_batch_gives_windows_and_what_follows_them():
    tokens, targets = text.batch(DATA, 50, 10, seed=0)
    for part in (tokens, targets):
        assert part.shape == (50, 10) and part.dtype == torch.int64
    starts = tokens[:, :1]
    assert torch.equal(tokens, starts + torch.arange(10))
    assert torch.equal(targets, tokens + 1)
    assert len(starts.unique()) > 30


def test_batch_reaches_both_ends_of_the_data():
    tokens, targets = text.batch(DATA[:12], 200, 10, seed=0)
    assert set(tokens[:, 0].tolist()) == {0, 1}
    assert targets.max() == 11
    tokens, targets = text.batch(DATA[:11], 1, 10, seed=0)
    assert tokens.tolist() == [list(range(10))] and targets.tolist() == [list(range(1, 11))]


def test_batch_depends_on_the_seed_alone():
    first = text.batch(DATA, 8, 16, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = text.batch(DATA, 8, 16, seed=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], text.batch(DATA, 8, 16, seed=4)[0])


@pytest.mark.gpu
def test_batch_is_the_same_on_the_gpu():
    here, there = text.batch(DATA, 8, 16, seed=3), text.batch(DATA, 8, 16, seed=3, device="cuda")
    assert all(part.is_cuda for part in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


def test_batch_owns_its_memory():
    tokens, targets = text.batch(text.load().train, 4, 32, seed=0)
    for part in (tokens, targets):
        assert part.untyped_storage().nbytes() == 4 * 32 * 8
        # A tensor around a NumPy array has a storage that cannot be resized.
        assert part.untyped_storage().resizable()
    assert not torch.from_numpy(np.zeros(3)).untyped_storage().resizable()
    assert tokens.untyped_storage().data_ptr() != targets.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((DATA, 2, 256), ValueError, "needs 257 bytes of data, but there are 256"),
        ((DATA, 0, 10), ValueError, "batch_size"),
        ((DATA, 2, 0), ValueError, "sequence_length"),
        ((DATA.astype(np.int64), 2, 10), TypeError, "int64"),
        ((DATA.reshape(16, 16), 2, 10), TypeError, r"\(16, 16\)"),
        ((b"some bytes", 2, 3), TypeError, "bytes"),
    ],
)
def test_batch_refuses_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        text.batch(*arguments, seed=0)


def test_decode_gives_the_text_back():
    content = "café".encode()
    assert text.decode(content) == "café"
    assert text.decode(np.frombuffer(content, dtype=np.uint8)) == "café"
    assert text.decode(torch.tensor(list(content))) == "café"
    assert text.decode(torch.tensor([], dtype=torch.int64)) == ""
    assert text.decode(content[:-1]) == "caf\ufffd"
    prose = text.load("prose").train
    tokens, _ = text.batch(prose, 1, 40, seed=0)
    assert text.decode(tokens[0]) in text.decode(prose)


@pytest.mark.parametrize(
    "tokens, error, words",
    [
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, "one row at a time"),
        (torch.tensor([1.5]), TypeError, "float32"),
        (torch.tensor([256]), ValueError, "256"),
        (torch.tensor([-1]), ValueError, "-1"),
    ],
)
def test_decode_refuses_what_is_no_row_of_bytes(tokens, error, words):
    with pytest.raises(error, match=words):
        text.decode(tokens)
