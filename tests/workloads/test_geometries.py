"""Well-known models: their parameters, counted and as published, and their configurations."""

import builtins
import json
from pathlib import Path

import pytest
import torch

from memlab.workloads import gpt, vit
from memlab.workloads.geometries import (
    GEOMETRIES,
    find_geometry,
    hugging_face_config,
    parameters,
)

NAMES = [geometry.name for geometry in GEOMETRIES]

# What the hub counts in each model's weights, shared ones once; Gemma 3's text models: KerasHub's
# presets, whose 4B leaves out 64 words. The ViT's are those of its paper's table, in millions.
PUBLISHED = {
    "GPT-2 124M": 124_439_808,
    "GPT-2 355M": 354_823_168,
    "GPT-2 774M": 774_030_080,
    "GPT-2 1558M": 1_557_611_200,
    "Llama-2 7B": 6_738_415_616,
    "Llama-2 13B": 13_015_864_320,
    "Llama-3 70B": 70_553_706_496,
    "Llama-3.1 8B": 8_030_261_248,
    "Llama-3.2 1B": 1_235_814_400,
    "Llama-3.2 3B": 3_212_749_824,
    "Mistral 7B": 7_248_023_552,
    "Qwen3 0.6B": 596_049_920,
    "Qwen3 1.7B": 1_720_574_976,
    "Qwen3 4B": 4_022_468_096,
    "Qwen3 8B": 8_190_735_360,
    "Qwen3 14B": 14_768_307_200,
    "Qwen3 32B": 32_762_123_264,
    "Gemma 3 1B": 999_885_952,
    "Gemma 3 4B text": 3_880_099_328,
    "ViT-B": 86_000_000,
    "ViT-L": 307_000_000,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_counts_what_the_model_has_and_what_was_published(name):
    transformers = pytest.importorskip("transformers")
    config = hugging_face_config(name)
    causal = name[:3] != "ViT"
    auto = transformers.AutoModelForCausalLM
    auto = auto if causal else transformers.AutoModelForImageClassification
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(name)
    assert next(model.parameters()).dtype == getattr(torch, find_geometry(name).dtype)
    assert parameters(name) == pytest.approx(PUBLISHED[name], rel=0.01)
    assert causal == (parameters(name) == PUBLISHED[name] or name == "Gemma 3 4B text")


def test_they_are_the_geometries_that_the_course_trains():
    assert parameters("GPT-2 124M") == gpt.gpt2_124m().parameter_count
    assert parameters("GPT-2 1558M") == gpt.gpt2_1558m().parameter_count
    assert parameters("ViT-B") == vit.vit_b_16().parameter_count


@pytest.mark.parametrize(
    "typed, name",
    [
        ("llama-3.1 8b", "Llama-3.1 8B"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1 8B"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2 7B"),
        ("Meta-Llama-3-70B", "Llama-3 70B"),
        ("gpt2", "GPT-2 124M"),
        ("openai-community/gpt2-xl", "GPT-2 1558M"),
        ("Qwen/Qwen3-0.6B", "Qwen3 0.6B"),
        ("Mistral-7B-v0.3", "Mistral 7B"),
        ("ViT-L/16", "ViT-L"),
    ],
)
def test_a_name_is_found_as_people_type_it(typed, name):
    assert find_geometry(typed).name == name


def test_every_geometry_has_a_name_of_its_own_and_a_source():
    called = [name for geometry in GEOMETRIES for name in (geometry.name, *geometry.also)]
    assert len({find_geometry(name).name for name in NAMES}) == len(NAMES)
    assert all(geometry.source for geometry in GEOMETRIES) and len(set(called)) == len(called)


def test_attention_sees_as_far_back_as_the_published_one():
    pytest.importorskip("transformers")
    assert hugging_face_config("Mistral 7B").sliding_window is None
    gemma = hugging_face_config("Gemma 3 1B")
    assert gemma.sliding_window == 512
    assert gemma.layer_types.count("full_attention") == 4  # each sixth of 26


@pytest.fixture
def config_file(tmp_path):
    """Writes a config.json and returns its path."""

    def write(content):
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000.0}


def test_a_local_file_is_read_from_its_path_and_from_its_folder(config_file, monkeypatch):
    pytest.importorskip("transformers")
    path = config_file(LLAMA)
    for name in (path, str(path), path.parent, str(path.parent)):
        config = hugging_face_config(name)
        assert (config.model_type, config.hidden_size, config.head_dim) == ("llama", 64, 16)
    # A folder here comes before the built-in model of its name, as in transformers.
    folder = path.parent / "gpt2"
    folder.mkdir()
    path.rename(folder / "config.json")
    monkeypatch.chdir(path.parent)
    assert hugging_face_config("gpt2").model_type == "llama"


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not JSON"),
        ("[]", 'has no "model_type"'),
        ({"hidden_size": 64}, 'has no "model_type"'),
        ({"model_type": 3}, 'has no "model_type"'),
        ({"model_type": "lama"}, "knows no model_type 'lama'"),
        ({**LLAMA, "auto_map": {"AutoConfig": "code.Config"}}, "names code of its own"),
        ({**LLAMA, "hidden_size": "wide"}, "no configuration of a llama model: Validation error"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content, said, config_file):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError) as error:
        hugging_face_config(config_file(content))
    assert said in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("Llama-3.1 88B", "The nearest names are: Llama-3.1 8B"),
        ("", "Known are: GPT-2 124M"),
        ("nowhere/config.json", "there is no such file. Nothing is downloaded"),
        (Path("nowhere"), "there is no such file"),
    ],
)
def test_what_is_no_model_gets_an_error_that_helps(name, said):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError) as error:
        hugging_face_config(name)
    assert said in str(error.value)
    with pytest.raises(ValueError, match='a model is a name such as "Llama-3.1 8B", not 8'):
        find_geometry(8)


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install transformers"):
        hugging_face_config("Llama-3.1 8B")
    assert parameters("Llama-3.1 8B") == PUBLISHED["Llama-3.1 8B"]  # needs no transformers
