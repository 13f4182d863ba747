import gc
import itertools
import math
import random
import threading
import weakref

import pytest
import torch
from torch.nn import functional as F

from memlab import measure, proof
from memlab.techniques.memory_pools import Plan, Pool, Request, plan
from memlab.workloads import gpt, vit
from tests.helpers import small_llama, training_step

# --- Plans ----------------------------------------------------------------------------------------


def clashes(requests, offsets):
    """Pairs that are alive together and share a byte, found one pair at a time."""
    pairs = itertools.combinations(zip(requests, offsets, strict=True), 2)
    return [
        (a, b)
        for (a, at_a), (b, at_b) in pairs
        if a.born < b.died and b.born < a.died and at_a < at_b + b.bytes and at_b < at_a + a.bytes
    ]


def some_requests(seed, count=60):
    draw = random.Random(seed)
    requests = []
    for _ in range(count):
        born = draw.randrange(40)
        died = math.inf if draw.random() < 0.1 else born + draw.randint(1, 12)
        requests.append(Request(draw.randint(1, 5000), born, died))
    return requests


@pytest.mark.parametrize("order", ["size", "birth"])
@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_no_two_that_are_alive_together_share_a_byte(order, alignment):
    for seed in range(8):
        requests = some_requests(seed)
        places = plan(requests, alignment, order)
        assert clashes(requests, places.offsets) == []
        assert all(offset % alignment == 0 for offset in places.offsets)
        ends = [
            -(-r.bytes // alignment) * alignment + at
            for r, at in zip(requests, places.offsets, strict=True)
        ]
        assert places.pool_bytes == max(ends) >= places.peak_bytes
        alive = [
            sum(r.bytes for r in requests if r.born <= moment < r.died) for moment in range(60)
        ]
        assert places.peak_bytes == max(alive)
        assert places.total_bytes == sum(r.bytes for r in requests)
        assert places.lost_bytes == places.pool_bytes - places.peak_bytes


def test_a_plan_by_hand():
    """Two long ones below; what is dead makes room; the smallest gap that fits is taken."""
    requests = [(100, 0, 9), (60, 0, 3), (60, 3, 9), (30, 1, 2)]
    assert plan(requests, 1) == Plan((0, 100, 100, 160), 190, 190, 250)
    # As they come: a hole that the third is too large for.
    come = [(10, 0, 2), (50, 0, 9), (20, 3, 9)]
    assert plan(come, 1, "birth").offsets == (0, 10, 60)
    assert plan(come, 1).offsets == (50, 0, 50)
    assert plan(come, 1).pool_bytes == plan(come, 1).peak_bytes == 70
    assert plan([]) == Plan((), 0, 0, 0)


def test_the_smallest_gap_is_taken_by_size_and_the_first_by_birth():
    fixed = [(100, 0, 9), (90, 0, 5), (80, 0, 9), (70, 0, 5), (66, 0, 9)]
    late = (65, 5, 9)
    assert plan([*fixed, late], 1).offsets[-1] == 270  # the gap of 70
    assert plan([*fixed, late], 1, "birth").offsets[-1] == 100  # the gap of 90, which comes first


def test_a_life_ends_before_it_dies():
    assert plan([(64, 0, 1), (64, 1, 2)]).pool_bytes == 64


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ([(0, 0, 1)], {}, "bytes of request 0 must be a whole number of at least 1, but it is 0"),
        ([(4, 0, 1), (2.5, 0, 1)], {}, "request 1"),
        ([(True, 0, 1)], {}, "whole number"),
        ([(4, 3, 3)], {}, "born at 3 and dies at 3"),
        ([(4, 5, 3)], {}, "must die after it is born"),
        ([(4, 0, math.nan)], {}, "must die after"),
        ([(4, 0, 1)], {"alignment": 48}, "power of two, but it is 48"),
        ([(4, 0, 1)], {"alignment": 0}, "power of two"),
        ([(4, 0, 1)], {"order": "best"}, "one of size, birth, but it is 'best'"),
    ],
)
def test_a_request_that_cannot_be_is_refused(requests, options, message):
    with pytest.raises(ValueError, match=message):
        plan(requests, **options)


# --- The pool -------------------------------------------------------------------------------------


def test_tensors_lie_in_one_buffer_aligned_and_apart():
    pool = Pool(1024)
    leases = [
        pool.take((3,)),
        pool.take((5, 2), torch.bfloat16),
        pool.take((1,), torch.bool),
        pool.take((2,), torch.complex64),
    ]
    starts = [lease.tensor.data_ptr() for lease in leases]
    assert [start - starts[0] for start in starts] == [0, 64, 128, 192]
    assert leases[1].tensor.shape == (5, 2) and leases[1].tensor.dtype is torch.bfloat16
    assert (pool.nbytes, pool.free_bytes, pool.largest_free_bytes) == (1024, 768, 768)
    for number, lease in enumerate(leases):
        lease.tensor.fill_(number)
    assert [lease.tensor.float().max().item() for lease in leases[:2]] == [0, 1]


def test_a_pool_allocates_once():
    def build():
        pool = Pool(4096)

        def step():
            for _ in range(20):
                pool.take((256,)).give_back()

        return step

    run = measure(build, steps=3, device="cpu")
    assert run.known_bytes == 4096 and len(run.ledger.blocks) == 1


def test_enough_bytes_and_no_gap():
    pool = Pool(512)
    leases = [pool.take((16,)) for _ in range(8)]
    for lease in leases[::2]:
        lease.give_back()
    assert (pool.free_bytes, pool.largest_free_bytes) == (256, 64)
    with pytest.raises(
        torch.OutOfMemoryError,
        match="no gap of 128 bytes: 256 of its 512 bytes are free, the largest gap is 64",
    ):
        pool.take((32,))
    leases[1].give_back()
    assert pool.take((48,)).tensor.data_ptr() == leases[3].tensor.data_ptr() - 192


def test_given_back_twice_and_used_after_that():
    lease = Pool(64).take((4,))
    lease.give_back()
    for use in (lease.give_back, lambda: lease.tensor):
        with pytest.raises(RuntimeError, match="was given back to its pool"):
            use()


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[1:],
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: (tensor * torch.ones(4, requires_grad=True)).sum(),  # autograd saved it
        lambda tensor: torch.from_dlpack(tensor),
    ],
)
def test_what_somebody_holds_is_not_taken_back(hold):
    pool = Pool(64)
    lease = pool.take((4,))
    lease.tensor.fill_(7)
    held = hold(lease.tensor)
    with pytest.raises(RuntimeError, match="still looks at these bytes"):
        lease.give_back()
    assert lease.tensor.tolist() == [7] * 4 and pool.free_bytes == 0  # as it was
    del held
    lease.give_back()
    assert pool.free_bytes == 64


def test_a_lease_that_is_dropped_comes_back_when_its_last_tensor_is_gone():
    pool = Pool(64)
    row = pool.take((2, 2)).tensor[0]
    assert pool.free_bytes == 0
    with pytest.raises(torch.OutOfMemoryError):
        pool.take((1,))
    del row
    assert pool.free_bytes == 64


def test_the_buffer_outlives_the_pool_as_long_as_a_tensor_does_and_no_longer():
    pool = Pool(64)
    buffer = weakref.ref(pool._buffer.untyped_storage())
    tensor = pool.take((4,)).tensor.fill_(3)
    del pool
    gc.collect()
    assert buffer() is not None and tensor.tolist() == [3] * 4
    del tensor
    assert buffer() is None


def test_a_planned_place_that_is_in_use_is_refused():
    pool = Pool(256)
    lease = pool.take((16,), at=64)
    assert lease.tensor.data_ptr() - pool._buffer.data_ptr() == 64
    for at, size in ((64, 1), (0, 17), (0, 64)):
        with pytest.raises(RuntimeError, match="still in use: a tensor lives longer than the plan"):
            pool.take((size,), at=at)
    pool.take((16,), at=0), pool.take((32,), at=128)
    lease.give_back()
    assert pool.take((64,), at=0).tensor.shape == (64,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,),), r"at least 1, but it is \(0,\)"),
        (((2, -1),), "at least 1"),
        (((2.0,),), "at least 1"),
        (((4,), torch.float32, 8), "multiple of the pool's alignment of 64 bytes, but it is 8"),
        (((4,), torch.float32, -64), "multiple"),
        (((4,), torch.float32, 256), "16 bytes at 256 end outside of the pool, which has 256"),
    ],
)
def test_bad_requests_to_a_pool_are_refused(arguments, message):
    pool = Pool(256)
    with pytest.raises(ValueError, match=message):
        pool.take(*arguments)
    assert pool.free_bytes == 256


def test_a_pool_that_cannot_be_is_refused():
    for nbytes in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="nbytes must be a whole number"):
            Pool(nbytes)
    with pytest.raises(ValueError, match="power of two, but it is 100"):
        Pool(64, alignment=100)


def test_a_write_to_one_tensor_is_no_write_to_another_for_autograd():
    pool, weight = Pool(256), torch.ones(4, requires_grad=True)
    one, other = pool.take((4,)), pool.take((4,))
    loss = (weight * one.tensor.fill_(3)).sum()
    other.tensor.fill_(1)
    loss.backward()
    assert weight.grad.tolist() == [3] * 4
    loss = (weight * one.tensor).sum()
    one.tensor.fill_(4)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation"
    ):  # and this still is one
        loss.backward()


def test_threads_never_get_the_same_bytes():
    pool, wrong = Pool(64 * 40), []

    def work(number):
        draw = random.Random(number)
        for _ in range(300):
            try:
                lease = pool.take((draw.randint(1, 64),), torch.int64)
            except torch.OutOfMemoryError:
                continue
            tensor = lease.tensor.fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)
            del tensor
            lease.give_back()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.free_bytes == pool.nbytes == pool.largest_free_bytes


def test_of_two_threads_that_give_back_one_lease_one_is_refused():
    for _ in range(50):
        lease, refused, start = Pool(64).take((4,)), [], threading.Barrier(2)

        def give_back(lease=lease, refused=refused, start=start):
            start.wait()
            try:
                lease.give_back()
            except RuntimeError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=give_back) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1 and "was given back" in refused[0]


# --- Real steps: recorded, planned, played back ---------------------------------------------------


def training(make_model, make_loss):
    def build():
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        return training_step(optimizer, lambda: make_loss(model))

    return build


def gpt_run():
    config = gpt.tiny(layers=2)
    tokens = torch.arange(64).reshape(2, 32)
    return training(lambda: gpt.GPT(config), lambda model: model(tokens, tokens))


def vit_run():
    config = vit.small(layers=1, hidden=32, heads=2)
    x, labels = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32), torch.tensor([3, 7])
    return training(lambda: vit.ViT(config), lambda model: F.cross_entropy(model(x), labels))


def a_llama():
    heads = {"num_key_value_heads": 2, "tie_word_embeddings": False}
    words = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return small_llama(max_position_embeddings=32, **heads, **words)


def hugging_face_run():
    tokens = torch.arange(32).reshape(2, 16)
    return training(
        a_llama,
        lambda model: model(tokens, labels=tokens).loss,
    )


@pytest.mark.parametrize("make_run", [gpt_run, vit_run, hugging_face_run])
def test_a_recorded_step_fits_its_planned_pool_and_every_tensor_keeps_its_bytes(make_run):
    run = measure(make_run(), device="cpu")
    requests = [
        Request(b.bytes, b.born, math.inf if b.died is None else b.died) for b in run.ledger.blocks
    ]
    for order in ("size", "birth"):
        places = plan(requests, order=order)
        assert clashes(requests, places.offsets) == []
        assert run.known_bytes == places.peak_bytes <= places.pool_bytes < 1.1 * run.known_bytes
        assert places.total_bytes > 1.5 * run.known_bytes
        # First fit finds these places by itself, so it is given none.
        replay(Pool(places.pool_bytes), requests, places.offsets if order == "size" else None)


def replay(pool, requests, offsets):
    moments = sorted(
        (moment, begins, number)
        for number, (_, *life) in enumerate(requests)
        for moment, begins in zip(life, (True, False), strict=True)
    )
    held = {}
    for _, begins, number in moments:
        if begins:
            held[number] = pool.take(
                (requests[number].bytes,), torch.uint8, offsets and offsets[number]
            )
            held[number].tensor.fill_(number % 251)
        else:
            low, high = torch.aminmax(held[number].tensor)
            assert low == high == number % 251
            held.pop(number).give_back()
    assert not held and pool.free_bytes == pool.nbytes


def test_first_fit_needs_what_its_plan_says_and_not_a_byte_less():
    for seed in range(5):
        requests = [r._replace(died=min(r.died, 99)) for r in some_requests(seed)]
        size = plan(requests, order="birth").pool_bytes
        replay(Pool(size), sorted(requests, key=lambda r: r.born), None)
        with pytest.raises(torch.OutOfMemoryError):
            replay(Pool(size - 64), sorted(requests, key=lambda r: r.born), None)


def static_run(config, static):
    def build():
        torch.manual_seed(0)
        model = gpt.GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        seeds = itertools.count()
        if static:
            sizes = [-(-w.nbytes // 64) * 64 for w in model.parameters()]
            inputs, gradients = Pool(8 * 16 * 64), Pool(sum(sizes))
            batch = inputs.take((16, 64), torch.int64)
            for w in model.parameters():
                w.grad = gradients.take(w.shape).tensor.zero_()

        def step():
            generator = torch.Generator().manual_seed(next(seeds))
            tokens = torch.randint(256, (16, 64), generator=generator)
            if static:
                tokens = batch.tensor.copy_(tokens)
            loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=not static)
            return loss

        return step

    return build


def test_training_with_static_batch_and_gradients_is_the_same_and_holds_the_gradients_at_the_peak():
    config = gpt.tiny(layers=2)  # with this batch the peak is where backward begins
    plain, static = (measure(static_run(config, s), steps=4, device="cpu") for s in (False, True))
    assert plain.losses == static.losses
    one, other = (proof.first_step(static_run(config, s)) for s in (False, True))
    assert proof.gradient_difference(one, other) == 0
    sizes = [-(-w.nbytes // 64) * 64 for w in gpt.GPT(config).parameters()]
    assert plain.phase == static.phase == "backward" and plain.columns["gradients"] == 0
    assert static.columns["gradients"] == static.known_bytes - plain.known_bytes == sum(sizes)


def test_a_hugging_face_model_generates_the_same_from_a_cache_in_a_pool():
    """Keys and values are copied into leases: what the model writes does not depend on where they
    lie.
    """
    transformers = pytest.importorskip("transformers")
    model = a_llama().eval().requires_grad_(False)
    prompt, pool, texts = torch.arange(8)[None], Pool(2**16), []
    for pooled in (False, True):
        cache, tokens, text, leases = transformers.DynamicCache(), prompt, [], []
        with torch.no_grad():
            for _ in range(6):
                logits = model(tokens, past_key_values=cache).logits
                tokens = logits[:, -1:].argmax(-1)
                text.append((tokens.item(), logits[0, -1].tolist()))
                if pooled:
                    old, leases = leases, []
                    for layer in cache.layers:
                        for name in ("keys", "values"):
                            lease = pool.take(getattr(layer, name).shape)
                            setattr(layer, name, lease.tensor.copy_(getattr(layer, name)))
                            leases.append(lease)
                    for lease in old:
                        lease.give_back()
        texts.append(text)
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_on_a_gpu_a_pool_is_one_block_and_autograd_keeps_its_tensors_apart():
    before = torch.cuda.memory_allocated()
    pool = Pool(2**22, "cuda", alignment=512)
    assert torch.cuda.memory_allocated() - before == 2**22
    one, other = pool.take((1000,)), pool.take((1000,), torch.float16)
    assert other.tensor.data_ptr() - one.tensor.data_ptr() == 4096
    weight = torch.ones(1000, requires_grad=True, device="cuda")
    loss = (weight * one.tensor.fill_(3)).sum()
    other.tensor.fill_(1)
    loss.backward()
    assert bool((weight.grad == 3).all())
    del loss
    one.give_back(), other.give_back()
    assert pool.free_bytes == 2**22


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_step_keeps_its_bytes():
    requests = some_requests(0, 30)
    requests = [r._replace(died=min(r.died, 99)) for r in requests]
    places = plan(requests, 512)
    replay(Pool(places.pool_bytes, "cuda", 512), requests, places.offsets)
