"""Data loading: the same batches from the device, from a file and with workers, the bytes that each
takes, a run that goes on after an interruption, and iterators that end cleanly."""

import multiprocessing
import os
import pickle
import traceback
from collections import UserDict, namedtuple
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from memlab import measure, proof
from memlab.techniques.data_loading import (
    TOKEN_TYPES,
    MemoryMappedTokens,
    ResumableBatches,
    pinned,
    prefetch,
)
from memlab.workloads import gpt, vit
from tests.helpers import equal, small_llama

BATCH, SEQUENCE, TOKENS = 4, 16, 20_000
CPU = torch.device("cpu")

fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs workers that are forked"
)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture
def path(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 100, TOKENS, dtype=np.uint8)
    tokens.tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def loader(dataset, workers=0, **options):
    context = "fork" if workers else None
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)


# --- The data set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOKEN_TYPES)
def test_windows_are_slices_of_the_file(tmp_path, dtype):
    largest = min(torch.iinfo(dtype).max, 2**40)
    numbers = np.linspace(0, largest, 50).astype(str(dtype).removeprefix("torch."))
    numbers.tofile(tmp_path / "tokens")
    dataset = MemoryMappedTokens(tmp_path / "tokens", 9, dtype=dtype, stride=8)
    assert len(dataset) == 6  # the last starts at 40 and ends at 49
    for index in range(-6, 6):
        start = 8 * (index % 6)
        assert dataset[index].dtype == dtype
        assert dataset[index].tolist() == numbers[start : start + 9].tolist()


@pytest.mark.parametrize(
    ("size", "length", "stride", "windows"),
    [
        (16, 16, None, 1),
        (31, 16, None, 1),
        (32, 16, None, 2),
        (32, 17, 16, 1),
        (33, 17, 16, 2),
        (10, 1, 1, 10),
    ],
)
def test_the_number_of_windows(tmp_path, size, length, stride, windows):
    (tmp_path / "tokens").write_bytes(bytes(size))
    dataset = MemoryMappedTokens(tmp_path / "tokens", length, stride=stride)
    assert len(dataset) == windows
    assert len(dataset[windows - 1]) == length
    for index in (windows, -windows - 1):
        with pytest.raises(IndexError, match=f"There are {windows} windows, and {index} is none"):
            dataset[index]


def test_a_window_owns_its_bytes_and_the_file_stays_as_it_is(path):
    before = path.read_bytes()
    dataset = MemoryMappedTokens(path, SEQUENCE)
    window = dataset[3]
    assert window.untyped_storage().nbytes() == SEQUENCE
    window.zero_()
    dataset.tokens[:5] = 77  # the map is this process's own
    assert dataset[3].any() and path.read_bytes() == before


def test_the_map_takes_no_memory_of_the_allocator(path):
    def build():
        dataset = MemoryMappedTokens(path, SEQUENCE)
        return lambda: float(dataset[5].sum())

    run = measure(build, device="cpu")
    # The window, and the sum with what it takes to make it: nothing that grows with the file.
    assert SEQUENCE <= run.known_bytes < SEQUENCE + 512


def test_a_pickled_data_set_carries_a_path_and_no_tokens(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    dataset = MemoryMappedTokens(path.name, SEQUENCE + 1, stride=SEQUENCE)
    data = pickle.dumps(dataset)
    monkeypatch.chdir("..")  # where a process started anew may be
    copied = pickle.loads(data)
    assert len(data) < 1000
    assert len(copied) == len(dataset) and torch.equal(copied[7], dataset[7])


def test_a_worker_that_is_started_anew_maps_the_file_itself(path):
    dataset = MemoryMappedTokens(path, SEQUENCE)
    spawned = DataLoader(dataset, batch_size=BATCH, num_workers=1, multiprocessing_context="spawn")
    iterator = iter(spawned)
    assert torch.equal(next(iterator), torch.stack([dataset[i] for i in range(BATCH)]))
    del iterator


class Texts(Dataset):
    """Python objects, and no more done than to look at them."""

    def __init__(self, count, length):
        self.texts = [f"{number:0{length}}" for number in range(count)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return len(self.texts[index])


def host_bytes(pids):
    """Memory with no file behind it; the proportional shares of processes add up to
    each page once.
    """
    tables = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids]
    return sum(
        1024 * int(line.split()[1])
        for table in tables
        for line in table
        if line.startswith("Pss_Anon:")
    )


@fork
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists()
    or "Pss_Anon" not in Path("/proc/self/smaps_rollup").read_text(),
    reason="needs Linux's smaps_rollup with Pss_Anon",
)
def test_a_worker_copies_a_list_that_it_reads_and_no_mapped_file(tmp_path):
    count, length = 10_000, 1000
    (tmp_path / "tokens").write_bytes(bytes(count * length))

    def growth(dataset):
        iterator = iter(loader(dataset, workers=1, batch_size=100))
        next(iterator)
        pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        before = host_bytes(pids)
        for _ in range(count // 100 - 1):
            next(iterator)
        return host_bytes(pids) - before

    assert growth(Texts(count, length)) > 0.8 * count * length
    assert growth(MemoryMappedTokens(tmp_path / "tokens", length)) < 0.4 * count * length


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (FileNotFoundError, "There is no file .*nowhere: write the tokens", {"path": "nowhere"}),
        (TypeError, "length must be an int, but it is 16.0", {"length": 16.0}),
        (ValueError, "length must be at least 1, but it is 0", {"length": 0}),
        (ValueError, "stride must be at least 1, but it is -1", {"stride": -1}),
        (TypeError, "stride must be an int, but it is True", {"stride": True}),
        (
            TypeError,
            "dtype must be one of torch.uint8, .*, but it is torch.float32",
            {"dtype": torch.float32},
        ),
        (TypeError, "dtype must be one of .*, but it is 'uint8'", {"dtype": "uint8"}),
        (ValueError, "windows of 20001 tokens .* has 20000", {"length": TOKENS + 1}),
        (
            ValueError,
            "multiple of 8 bytes .* has 19999: is it of another dtype",
            {"dtype": torch.int64},
        ),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(path, error, words, change):
    if change.get("dtype") == torch.int64:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(error, match=words):
        MemoryMappedTokens(**{"path": path, "length": SEQUENCE, **change})


# --- The order ------------------------------------------------------------------------------------


def test_an_epoch_has_each_index_once_and_leaves_out_what_fills_no_batch():
    order = ResumableBatches(10, 3, seed=5)
    assert order.batches_per_epoch == 3
    batches = list(islice(order, 300))
    for epoch in range(100):
        indices = sum(batches[3 * epoch : 3 * epoch + 3], [])
        assert len(set(indices)) == 9 and set(indices) <= set(range(10))
    # Not always the same index is left out.
    assert {i for batch in batches[:30] for i in batch} == set(range(10))


def test_orders_of_seeds_and_epochs_are_different():
    """Also where seed + epoch is the same, and where they differ above the 32 bits that a generator
    takes.
    """
    epochs = [
        tuple(next(iter(ResumableBatches(50, 50, seed=seed, start=epoch))))
        for seed in (0, 1, 2, 2**32, 2**40)
        for epoch in range(4)
    ]
    assert len(set(epochs)) == len(epochs)


def test_batch_n_is_the_same_after_an_interruption_at_any_step():
    whole = list(islice(ResumableBatches(11, 2, seed=1), 20))
    for start in range(20):
        assert (
            list(islice(ResumableBatches(11, 2, seed=1, start=start), 20 - start)) == whole[start:]
        )


def test_the_order_neither_uses_nor_moves_the_random_state_of_the_process():
    torch.manual_seed(1)
    state, order = torch.get_rng_state(), list(islice(ResumableBatches(100, 10), 25))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert list(islice(ResumableBatches(100, 10), 25)) == order


def test_the_order_takes_four_bytes_an_index():
    def build():
        batches = iter(ResumableBatches(100_000, 4))
        return lambda: next(batches)[0]

    assert 400_000 <= measure(build, device="cpu").known_bytes < 401_000


@fork
def test_the_batches_do_not_depend_on_the_number_of_workers(path):
    dataset = MemoryMappedTokens(path, SEQUENCE)
    order = ResumableBatches(len(dataset), BATCH, start=300)  # an epoch has 312
    alone = list(islice(loader(dataset, batch_sampler=order), 20))
    with_workers = prefetch(loader(dataset, 2, batch_sampler=order), CPU, 3)
    assert equal(alone, list(islice(with_workers, 20)))


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (TypeError, "length must be an int", {"length": "10"}),
        (ValueError, "length must be at least 1", {"length": 0}),
        (ValueError, "batch_size must be at least 1", {"batch_size": 0}),
        (ValueError, "A batch of 11 is more than there are indices, 10", {"batch_size": 11}),
        (ValueError, "seed must be at least 0, but it is -1", {"seed": -1}),
        (TypeError, "start must be an int, but it is None", {"start": None}),
        (ValueError, "start must be at least 0", {"start": -2}),
    ],
)
def test_an_order_that_cannot_be_is_refused(error, words, change):
    with pytest.raises(error, match=words):
        ResumableBatches(**{"length": 10, "batch_size": 2, **change})


# --- The way to the device ------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1, 2, 7, 100])
def test_the_same_batches_in_the_same_order(in_flight):
    batches = [torch.randn(3, 2) for _ in range(10)]
    arrived = list(prefetch(batches, "cpu", in_flight))
    assert equal(arrived, batches)
    own = {tensor.data_ptr() for tensor in batches}
    assert not own & {
        tensor.data_ptr() for tensor in arrived
    }  # the loader may use its memory again


@pytest.mark.parametrize("in_flight", [0, 1, 4])
def test_no_more_than_in_flight_batches_are_asked_for_ahead(in_flight):
    asked = []

    def source():
        for number in range(10):
            asked.append(number)
            yield torch.tensor(number)

    batches = prefetch(source(), CPU, in_flight)
    assert asked == []
    for number in range(10):
        assert next(batches) == number
        assert len(asked) == min(number + 1 + in_flight, 10)
    assert list(batches) == []


def test_batches_keep_their_form():
    Pair = namedtuple("Pair", "tokens mask")
    tensor, permuted = torch.randn(2, 3), torch.randn(2, 3, 4).permute(2, 0, 1)
    batch = {"pair": Pair(tensor, [permuted, "text"]), "labels": (tensor.bool(), None), "count": 3}
    (arrived,) = prefetch([batch], CPU)
    assert type(arrived["pair"]) is Pair and torch.equal(arrived["pair"].tokens, tensor)
    assert torch.equal(arrived["pair"].mask[0], permuted)
    assert (
        arrived["pair"].mask[0].stride() == permuted.stride() and arrived["pair"].mask[1] == "text"
    )
    assert arrived["labels"][0].dtype == torch.bool and arrived["labels"][1] is None
    assert arrived["count"] == 3 and arrived["pair"].tokens is not tensor
    # Hugging Face's batches are of this kind.
    (arrived,) = prefetch([UserDict(input_ids=tensor)], CPU)
    assert torch.equal(arrived["input_ids"], tensor)


def test_a_source_ends_when_its_consumer_stops():
    ended = []

    def source():
        try:
            while True:
                yield torch.zeros(1)
        finally:
            ended.append(True)

    batches = prefetch(source(), CPU)
    next(batches)
    assert ended == []
    batches.close()
    assert ended == [True]
    for _ in prefetch(source(), CPU):
        break  # and so does one that is let go
    assert ended == [True, True]


@fork
def test_workers_end_when_the_consumer_stops(path):
    dataset = MemoryMappedTokens(path, SEQUENCE)
    batches = prefetch(loader(dataset, 2, batch_sampler=ResumableBatches(len(dataset), BATCH)), CPU)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


class Broken(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 20:
            raise OSError("window 20 cannot be read")
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=fork)])
def test_an_error_of_the_loader_comes_through_and_ends_it(workers):
    batches = prefetch(loader(Broken(), workers, batch_size=4), CPU)
    seen = []
    with pytest.raises(OSError, match="window 20 cannot be read") as caught:
        for batch in batches:
            seen += batch.tolist()
    # A DataLoader that only the garbage collector can free, here for its own traceback, takes
    # seconds to end.
    traceback.clear_frames(caught.tb)
    assert seen == list(range(16))  # one batch, which was behind, never had its turn
    assert list(batches) == []


def test_nothing_comes_of_nothing():
    assert list(prefetch([], CPU, 3)) == []


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "in_flight must be at least 0, but it is -1", ([], CPU, -1)),
        (TypeError, "in_flight must be an int, but it is 1.5", ([], CPU, 1.5)),
        (TypeError, "batches must be a DataLoader or another iterable, but it is 7", (7, CPU)),
        (RuntimeError, "nonsense", ([], "nonsense")),
    ],
)
def test_what_cannot_be_prefetched_is_refused_at_once(error, words, arguments):
    with pytest.raises(error, match=words):
        prefetch(*arguments)


# --- Real models: the same gradients, and bytes by hand -------------------------------------------


def split(window):
    return window[:, :-1].contiguous().long(), window[:, 1:].contiguous().long()


def run_of(make_model, source):
    def build():
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = source()

        def step():
            inputs, targets = next(batches)
            loss = model(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    return build


def make_gpt():
    return gpt.GPT(gpt.tiny(layers=2))


class LlamaWithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = small_llama(use_cache=False)

    def forward(self, tokens, targets):
        logits = self.model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text_kept(path):
    dataset = MemoryMappedTokens(path, SEQUENCE + 1, stride=SEQUENCE)
    data = dataset.tokens.long()
    for numbers in ResumableBatches(len(dataset), BATCH):
        yield split(
            torch.stack([data[SEQUENCE * n : SEQUENCE * n + SEQUENCE + 1] for n in numbers])
        )


def text_streamed(path, in_flight, workers=0):
    dataset = MemoryMappedTokens(path, SEQUENCE + 1, stride=SEQUENCE)
    order = ResumableBatches(len(dataset), BATCH)
    return map(split, prefetch(loader(dataset, workers, batch_sampler=order), CPU, in_flight))


@fork
def test_workers_take_nothing_off_the_device(path):
    alone = measure(run_of(make_gpt, lambda: text_streamed(path, 1)), device="cpu")
    with_workers = measure(
        run_of(make_gpt, lambda: text_streamed(path, 1, workers=2)), device="cpu"
    )
    assert with_workers.known_bytes == alone.known_bytes
    assert with_workers.losses == alone.losses


def test_a_vit_on_streamed_images_holds_the_batches_in_flight():
    in_flight = 6
    config = vit.small(layers=2, hidden=32, heads=2)
    size, count = config.image_size, 60
    pixels = torch.randint(256, (count, 1, size, size), dtype=torch.uint8)
    labels = torch.randint(10, (count,))

    def kept():
        here = pixels.clone(), labels.clone()
        for numbers in ResumableBatches(count, BATCH):
            yield here[0][numbers].float() / 255, here[1][numbers]

    def streamed():
        order = ResumableBatches(count, BATCH)
        batches = prefetch(
            loader(TensorDataset(pixels, labels), batch_sampler=order), CPU, in_flight
        )
        return ((images.float() / 255, targets) for images, targets in batches)

    before, after = (run_of(lambda: vit.ViT(config), source) for source in (kept, streamed))
    assert proof.gradient_difference(proof.first_step(before), proof.first_step(after)) == 0.0
    before, after = measure(before, device="cpu"), measure(after, device="cpu")
    # The generator in `streamed` has a name for the images in use: their bytes are there beside
    # their floats.
    one, extra = BATCH * (size * size + 8), BATCH * size * size
    difference = count * (size * size + 8) - (in_flight * one + extra)
    assert before.known_bytes - after.known_bytes == difference


def test_a_gpt_on_a_streamed_text_holds_the_batches_in_flight_and_no_data_set(path):
    kept, streamed = (
        run_of(make_gpt, source)
        for source in (lambda: text_kept(path), lambda: text_streamed(path, 3))
    )
    assert proof.gradient_difference(proof.first_step(kept), proof.first_step(streamed)) == 0.0

    before, after = measure(kept, device="cpu"), measure(streamed, device="cpu")
    assert before.losses == after.losses
    behind = 3 * BATCH * (SEQUENCE + 1)
    assert before.known_bytes - after.known_bytes == 8 * TOKENS - behind
    # No module was given the data set, nor the batches in flight: they are kept.
    assert before.columns["kept"] - after.columns["kept"] == 8 * TOKENS - behind
    windows = (TOKENS - 1) // SEQUENCE
    in_use = 2 * 8 * BATCH * SEQUENCE
    assert after.columns["batch"] == in_use == before.columns["batch"]
    assert after.columns["kept"] == behind + 4 * windows  # and the order
    assert after.bytes_after_step[0] == after.bytes_after_step[1]


# The last: with transformers imported, everything that walks Python's objects takes longer.
def test_a_llama_of_hugging_face_does_not_notice(path):
    kept, streamed = (
        run_of(LlamaWithLoss, source)
        for source in (lambda: text_kept(path), lambda: text_streamed(path, 3))
    )
    assert proof.gradient_difference(proof.first_step(kept), proof.first_step(streamed)) == 0.0


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
def test_no_batch_is_used_before_it_has_arrived_or_overwritten_while_it_is_used(pin):
    """Large copies beside slow kernels. What each batch held is compared at the end, so nothing
    waits.
    """
    batches = [torch.full((2**20,), number, dtype=torch.int32) for number in range(40)]
    if pin:
        batches = [batch.pin_memory() for batch in batches]
    slow, wrong = torch.randn(2048, 2048, device="cuda"), torch.zeros((), device="cuda")
    for number, batch in enumerate(prefetch(batches, "cuda", 3)):
        for _ in range(5):
            slow = torch.tanh(slow @ slow)
        wrong += (batch != number).sum()
    assert wrong.item() == 0


@pytest.mark.gpu
def test_no_more_than_the_batches_in_flight_are_on_the_gpu():
    batches = [torch.zeros(2**20, dtype=torch.uint8).pin_memory() for _ in range(20)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    iterator = prefetch(batches, "cuda", 2)
    for _ in range(20):
        next(iterator)
    assert torch.cuda.max_memory_allocated() - before == 3 * 2**20
    assert list(iterator) == [] and torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_batches_that_are_let_go_in_flight_are_not_written_to_later():
    batches = [torch.full((2**24,), 7, dtype=torch.uint8).pin_memory() for _ in range(8)]
    iterator = prefetch(batches, "cuda", 6)
    next(iterator)
    iterator.close()
    mine = [
        torch.zeros(2**24, dtype=torch.uint8, device="cuda") for _ in range(8)
    ]  # may be the same memory
    assert not any(tensor.any().item() for tensor in mine)


@pytest.mark.gpu
def test_another_stream_is_refused():
    batches = prefetch([torch.zeros(8)] * 8, "cuda")
    next(batches)
    with (
        torch.cuda.stream(torch.cuda.Stream()),
        pytest.raises(RuntimeError, match="stay in one stream"),
    ):
        next(batches)


def test_a_batch_is_pinned_where_there_is_a_gpu():
    batch = torch.arange(6, dtype=torch.uint8)
    found = pinned(batch)
    assert torch.equal(found, batch) and found.is_pinned() == torch.cuda.is_available()
