"""GPUs by the names that people type: their bytes, and errors that help."""

import json
from pathlib import Path

import pytest

from memlab.meters.gpus import find_gpu, known_gpus
from memlab.units import GiB, MiB

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.mark.parametrize(
    "typed, name",
    [
        ("T4", "Tesla T4"),
        ("  nvidia geforce rtx 4090 ", "NVIDIA GeForce RTX 4090"),
        ("RTX4090", "NVIDIA GeForce RTX 4090"),
        ("4090 24GB", "NVIDIA GeForce RTX 4090"),
        ("RTX 3060", "NVIDIA GeForce RTX 3060"),
        ("rtx 3060 8 GiB", "NVIDIA GeForce RTX 3060 8GB"),
        ("RTX 4070 Ti SUPER", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("5060 Ti 16 GB", "NVIDIA GeForce RTX 5060 Ti 16GB"),
        ("A10", "NVIDIA A10"),
        ("A10G", "NVIDIA A10G"),
        ("A100 80", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
        ("A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"),
        ("V100 32G", "Tesla V100-SXM2-32GB"),
        ("P100", "Tesla P100-PCIE-16GB"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("h100 80 gb", "NVIDIA H100 80GB HBM3"),
        ("6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("mi300x", "AMD Instinct MI300X"),
    ],
)
def test_a_name_is_found_as_people_type_it(typed, name):
    assert find_gpu(typed).name == name


def test_every_gpu_is_found_by_its_name_and_has_less_than_its_box_says():
    assert len({gpu.name for gpu in known_gpus()}) == len(known_gpus()) >= 45
    for gpu in known_gpus():
        assert find_gpu(gpu.name) is gpu
        assert gpu.source and 7 * GiB < gpu.memory_bytes < 192 * GiB
        assert gpu.memory_bytes % MiB == 0 or gpu.memory_bytes % 4096 == 0  # bytes of pages


def test_the_h100_is_the_one_that_was_measured():
    files = ("nvidia-h100-80gb-hbm3.json", "nvidia-h100-80gb-hbm3-large.json")
    records = [json.loads((RESULTS / file).read_text()) for file in files]
    gpu = find_gpu("H100")
    for record in records:
        assert record["environment"]["gpu"] == gpu.name
        assert record["environment"]["gpu_bytes"] == gpu.memory_bytes
    # The first run of the process: later ones stand in a context that has loaded more kernels.
    variants = [variant for record in records[1]["records"] for variant in record["variants"]]
    beside = [variant["device_bytes"] - variant["reserved_bytes"] for variant in variants]
    assert beside[0] == min(beside) == gpu.context_bytes
    assert max(beside) - min(beside) == 96 * MiB


@pytest.mark.parametrize(
    "name, architecture, workspace",
    [
        ("V100 16GB", (7, 0), 8_519_680),
        ("RTX 4090", (8, 9), 8_519_680),
        ("H200", (9, 0), 32 * MiB),
        ("B200", (10, 0), 32 * MiB),
        ("RTX 5090", (12, 0), 32 * MiB),
        ("MI300X", None, 128 * MiB),
        ("24 GiB", None, 32 * MiB),
    ],
)
def test_a_workspace_is_pytorchs_default_for_the_architecture(name, architecture, workspace):
    gpu = find_gpu(name)
    assert (gpu.architecture, gpu.workspace_bytes) == (architecture, workspace)


@pytest.mark.parametrize(
    "size, memory",
    [
        ("24 GiB", 24 * GiB),
        ("24GB", 24_000_000_000),
        (24 * GiB, 24 * GiB),
        (str(24 * GiB), 24 * GiB),
        ("64 KiB", 65_536),
    ],
)
def test_a_size_is_a_gpu_of_which_nothing_else_is_known(size, memory):
    gpu = find_gpu(size)
    assert (gpu.memory_bytes, gpu.architecture, gpu.multiprocessors) == (memory, None, None)


@pytest.mark.parametrize(
    "typed, said",
    [
        ("A100", 'several A100. Write "A100 40GB" or "A100 80GB"'),
        ("V100", 'several V100. Write "V100 16GB" or "V100 32GB"'),
        ("rtx 4060 ti", 'Write "rtx 4060 ti 8GB" or "rtx 4060 ti 16GB"'),
        ("RTX 4091", "'RTX 4091'. The nearest names are: NVIDIA GeForce RTX 4090"),
        ("L40", "NVIDIA L40S"),
        ("3050", "no GPU is known as '3050'"),
        (24, "no GPU is known as 24"),
        (0, "no GPU is known as 0"),
        ("-24 GiB", 'A size does, too: "24 GiB"'),
        ("", "no GPU is known as ''. A size does"),
        ("(", "no GPU is known as"),
        (True, "a GPU is a name"),
        (None, "a GPU is a name"),
        (24.0, "a GPU is a name"),
    ],
)
def test_what_is_no_gpu_gets_an_error_that_helps(typed, said):
    with pytest.raises(ValueError) as error:
        find_gpu(typed)
    assert said in str(error.value)
