"""Sharding: the weights and gradients of one process, the bytes of the formula, and ranks that are
ended.

Results are compared in real processes, which `run_ranks` starts: this file is also what they run.
Bytes are counted on one rank of PyTorch's fake process group, whose messages go nowhere.
"""

import functools
import gc
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import nn

from memlab import measure
from memlab.techniques.sharding import RankError, run_ranks, shard_training, whole_parameters
from memlab.workloads import gpt, vit

STAGES = (0, 1, 2, 3)
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adamw = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)


# --- What every rank runs: four models, three steps each, every stage -----------------------------


def make_gpt():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (12, 16), generator=generator)
    model = gpt.GPT(gpt.tiny(layers=2, hidden=36))
    return model, lambda rows: model(tokens[rows], tokens[rows])


def make_vit():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (12,), generator=generator)
    model = vit.ViT(vit.small(image_size=16, layers=2, hidden=16))
    return model, lambda rows: model(images[rows], labels[rows])


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (12, 8), generator=generator)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return model, lambda rows: model(input_ids=tokens[rows], labels=tokens[rows]).loss


def make_odd():
    """Sizes that two or three do not divide, a layer in two blocks, one that is frozen and one
    unused.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 7, generator=generator)
    blocks = [nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(3)]
    blocks[2][0] = blocks[0][0]
    blocks[1][2].requires_grad_(False)
    model = nn.Module()
    model.unused, model.blocks = nn.Linear(3, 3), nn.Sequential(*blocks)
    model.forward = model.blocks.forward
    return model, lambda rows: model(inputs[rows]).square().mean()


MAKES = {"gpt": make_gpt, "vit": make_vit, "llama": make_llama, "odd": make_odd}
OF_THREE = (
    "gpt",
    "odd",
)  # the models that three ranks train, too: importing transformers thrice takes its time


def train(make, stage, *, rank=0, ranks=1, group=None, backwards=1, zero="optimizer"):
    """The losses of three steps and the weights after them; `stage` None trains one process with
    all rows.
    """
    torch.manual_seed(rank)  # other weights on each rank: rank 0's count
    model, loss_of = make()
    optimizer = (
        sgd(model.parameters()) if stage is None else shard_training(model, sgd, stage, group=group)
    )
    losses = []
    for _ in range(3):
        for backward in range(backwards):
            size = 12 // ranks // backwards
            start = (rank * backwards + backward) * size
            loss = loss_of(slice(start, start + size)) / backwards
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        (optimizer if zero == "optimizer" else model).zero_grad()
    with whole_parameters(model):
        return losses, [parameter.detach().clone() for parameter in model.parameters()]


def on_a_rank(folder):
    """Three ranks train, and before that two of them in a group of their own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, pair, found = dist.get_rank(), dist.new_group([0, 1]), {}
    for ranks, group, makes in ((2, pair, MAKES), (3, None, {"gpt": make_gpt, "odd": make_odd})):
        if rank < ranks:
            here = {"rank": rank, "ranks": ranks, "group": group}
            for stage in STAGES:
                for name, make in makes.items():
                    found[ranks, name, stage] = train(make, stage, **here)
                found[ranks, "accumulated", stage] = train(make_odd, stage, backwards=2, **here)
                found[ranks, "zeroed", stage] = train(make_odd, stage, zero="model", **here)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    print(f"rank {rank} is done")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks(__file__, 3, folder) == [f"rank {rank} is done\n" for rank in range(3)]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(3)]


def largest_difference(weights, others):
    return max((a - b).abs().max().item() for a, b in zip(weights, others, strict=True))


# --- The results are those of one process ---------------------------------------------------------


CASES = [(2, name) for name in MAKES] + [(3, "gpt"), (3, "odd")]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_stage_trains_as_one_process_does(found, ranks, name):
    torch.manual_seed(0)
    start = [parameter.detach().clone() for parameter in MAKES[name]()[0].parameters()]
    expected_losses, expected = train(MAKES[name], None)
    assert largest_difference(start, expected) > 1e-3  # it does train
    for stage in STAGES:
        given = [found[rank][ranks, name, stage] for rank in range(ranks)]
        for _, weights in given:
            assert largest_difference(weights, expected) < 2e-5
            assert largest_difference(weights, given[0][1]) == 0
        losses = [
            sum(at_once) / ranks for at_once in zip(*(losses for losses, _ in given), strict=True)
        ]
        assert losses == pytest.approx(expected_losses, abs=1e-5)


@pytest.mark.parametrize("name", MAKES)
def test_two_ranks_get_the_same_bits_at_every_stage(found, name):
    for stage in (1, 2, 3):
        assert largest_difference(found[0][2, name, stage][1], found[0][2, name, 0][1]) == 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_backward_passes_add_up(found, ranks, stage):
    _, expected = train(make_odd, None)
    assert largest_difference(found[0][ranks, "accumulated", stage][1], expected) < 2e-5


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_of_the_model_is_as_good(found, stage):
    assert largest_difference(found[0][2, "zeroed", stage][1], found[0][2, "odd", stage][1]) == 0


# --- The bytes are those of the formula -----------------------------------------------------------


@pytest.fixture
def fake():
    """A fake process group of the size that is asked for."""

    def start(ranks):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=0, world_size=ranks)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


WIDTH, LAYERS = 64, 8


def build_layers(stage):
    def build():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        optimizer = shard_training(model, adamw, stage)
        rows = torch.ones(2, WIDTH)

        def step():
            model(rows).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [2, 8])
def test_what_is_held_is_divided(fake, stage, ranks):
    fake(ranks)
    run = measure(build_layers(stage), device="cpu")
    weight = 4 * WIDTH * WIDTH
    parameters, gradients, state = (ranks if stage >= divided else 1 for divided in (3, 2, 1))
    end = run.ledger.columns_at(
        max(span.end for span in run.ledger.phases if span.kind == "backward")
    )
    assert end["parameters"] == LAYERS * weight // parameters + 4 * LAYERS * (stage == 3)
    assert end["gradients"] == LAYERS * weight // gradients
    assert end["optimizer_state"] == 2 * LAYERS * weight // state + 4 * LAYERS


def test_stage_3_holds_one_block_at_a_time(fake):
    fake(8)
    run = measure(build_layers(3), device="cpu")
    weight, row = 4 * WIDTH * WIDTH, 4 * WIDTH
    # The slices of parameters and state, the step counters, what is left of absent weights; all
    # gradients but one.
    held = LAYERS * 3 * weight // 8 + 2 * 4 * LAYERS + (LAYERS - 1) * weight // 8
    # In backward: one weight, or its gradient and the slice of it. And less than twenty rows of two
    # vectors.
    line = run.timeline
    assert 0 <= line.total[line.phase == "backward"].max() - held - 2 * weight < 40 * row


def test_no_rank_holds_more_than_another(fake):
    sizes = []
    for rank in range(3):
        dist.init_process_group("fake", rank=rank, world_size=3)
        model, _ = make_odd()
        optimizer = shard_training(model, sgd, 1)
        sizes.append([p.numel() for p in optimizer.param_groups[0]["params"]])
        dist.destroy_process_group()
    trained = [p.numel() for p in make_odd()[0].parameters() if p.requires_grad]
    assert sizes[0] == sizes[1] == sizes[2] == [-(-count // 3) for count in trained]


# --- What is not there cannot be mistaken for a number --------------------------------------------


def test_an_absent_parameter_is_nan_and_whole_again_inside(fake):
    fake(1)
    model, loss_of = make_gpt()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    shard_training(model, sgd, 3)
    shapes = [parameter.shape for parameter in model.parameters()]
    assert shapes == [weight.shape for weight in before]
    assert all(parameter.isnan().all() for parameter in model.parameters())
    with whole_parameters(model):
        assert all(map(torch.equal, model.parameters(), before))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    with torch.no_grad():
        assert loss_of(slice(0, 2)).isfinite()
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_parameters_of_a_plain_model_are_whole():
    model = nn.Linear(2, 2)
    with whole_parameters(model):
        assert not model.weight.isnan().any()


@pytest.mark.parametrize("stage", STAGES)
def test_a_deleted_model_is_gone(fake, stage):
    fake(2)
    model, _ = make_gpt()
    optimizer = shard_training(model, sgd, stage)
    gone = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(next(model.parameters()))]
    del model, _, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


# --- Bad input ------------------------------------------------------------------------------------


def test_a_process_group_is_needed():
    with pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        shard_training(nn.Linear(2, 2), sgd, 1)


def test_bad_input_is_refused(fake):
    fake(2)
    for stage in (-1, 4, "3", True, None):
        with pytest.raises(ValueError, match="stage must be 0, 1, 2 or 3"):
            shard_training(nn.Linear(2, 2), sgd, stage)
    with pytest.raises(ValueError, match="no weights to train"):
        shard_training(nn.Linear(2, 2).requires_grad_(False), sgd, 1)
    with pytest.raises(ValueError, match="no weights to train on a real device"):
        shard_training(nn.Linear(2, 2, device="meta"), sgd, 1)
    with pytest.raises(ValueError, match="No blocks found in Linear: pass blocks="):
        shard_training(nn.Linear(2, 2), sgd, 3)
    with pytest.raises(ValueError, match="No blocks found"):
        shard_training(nn.Sequential(nn.Linear(2, 2)), sgd, 3, blocks=[nn.Linear(2, 2)])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shard_training(model, sgd, 3)
    with pytest.raises(ValueError, match="sharded already"):
        shard_training(model, sgd, 1)


def test_an_optimizer_that_would_compute_something_else_is_refused(fake):
    fake(2)
    with pytest.raises(TypeError, match="Adafactor needs whole matrices"):
        shard_training(nn.Linear(2, 2), torch.optim.Adafactor, 1)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="exactly the parameters it is given"):
        shard_training(nn.Linear(2, 2), lambda shards: sgd(other.parameters()), 1)
    with pytest.raises(ValueError, match="exactly the parameters it is given"):
        shard_training(nn.Linear(2, 2), lambda shards: sgd(shards[:1]), 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_that_cannot_be_made_has_changed_nothing_and_the_next_try_works(fake, stage):
    fake(1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    state = {name: len(value) for name, value in vars(model[0]).items() if isinstance(value, dict)}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        shard_training(model, lambda shards: sgd(shards, rate=1), stage)
    for (parameter, value), now in zip(before, model.parameters(), strict=True):
        assert now is parameter and torch.equal(now, value)
    hooks = {name: len(value) for name, value in vars(model[0]).items() if isinstance(value, dict)}
    assert hooks == state
    shard_training(model, sgd, stage)


# --- The launcher ---------------------------------------------------------------------------------


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_rank_that_dies_ends_all_and_is_named(tmp_path):
    path = script(
        tmp_path,
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('out of"
        " data')\ntime.sleep(600)",
    )
    with pytest.raises(  # at the limit it would be another error
        RankError, match=r"Rank 1 of 2 died \(exit code 1\)(.|\n)*out of data"
    ) as caught:
        run_ranks(path, 2, seconds=500)
    assert (caught.value.rank, caught.value.exit_code) == (1, 1)


def test_ranks_that_hang_are_ended(tmp_path):
    path = script(
        tmp_path,
        "import os, sys, time\nopen(os.path.join(sys.argv[1], os.environ['RANK']),"
        " 'w').write(str(os.getpid()))\nprint('waiting', flush=True)\ntime.sleep(600)",
    )
    with pytest.raises(RankError, match="After 6 s 2 ranks were not done") as caught:
        run_ranks(path, 2, tmp_path, seconds=6)
    assert caught.value.rank is None
    for rank in range(2):
        process = tmp_path / str(rank)
        if process.exists():  # it had begun within the time
            assert not Path("/proc", process.read_text()).exists()


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        run_ranks(tmp_path / "nothing.py", 2)
    path = script(tmp_path, "")
    for count, seconds in ((0, 1), (-1, 1), (True, 1), (2.0, 1), (2, 0), (2, -1)):
        with pytest.raises(ValueError, match="must be positive"):
            run_ranks(path, count, seconds=seconds)


@pytest.mark.gpu
def test_one_gpu_under_nccl(tmp_path):
    path = script(
        tmp_path,
        "import torch, torch.distributed as dist\nfrom memlab.techniques.sharding import"
        " shard_training\ndist.init_process_group('nccl')\nfor stage in range(4):\n   "
        " torch.manual_seed(0)\n    model = torch.nn.Sequential(torch.nn.Linear(8, 8),"
        " torch.nn.Linear(8, 8)).cuda()\n    optimizer = shard_training(model, torch.optim.AdamW,"
        " stage)\n    for _ in range(2):\n        loss = model(torch.ones(2, 8,"
        " device='cuda')).square().mean()\n        loss.backward(); optimizer.step();"
        " optimizer.zero_grad()\n    print(f'{loss.item():.6f}')\ndist.destroy_process_group()\n",
    )
    [said] = run_ranks(path, 1)
    assert len(said.split()) == 4 and len(set(said.split())) == 1


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
