"""The sizes of well-known models, and their Hugging Face configurations without a download.

Each geometry names the place its numbers are from. What changes neither a shape nor a byte is left
out (the base of the rotary positions, the numbers of special tokens), so a model built from one of
them has the published memory, and not the published behaviour.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LanguageGeometry:
    """The sizes of a language model that predicts the next token.

    Attributes:
        name: what people call it.
        also: further names; the last part of its address on huggingface.co is one.
        model_type: its architecture in transformers: gpt2, llama, mistral, qwen3, gemma3_text.
        vocabulary: how many tokens the embedding has.
        context: the longest sequence it was made for, in tokens.
        hidden: the width of the model.
        layers: how many blocks it has.
        heads: how many attention heads a block has.
        key_value_heads: how many of them have keys and values of their own.
        head_size: the width of a head.
        intermediate: the width inside the MLP.
        tied: whether the output layer shares the embedding's weight.
        dtype: the type of the published weights, in which transformers then builds the model.
        source: where these numbers are from.
        window: how many tokens back a layer with sliding-window attention sees; None: all.
    """

    name: str
    also: tuple[str, ...]
    model_type: str
    vocabulary: int
    context: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    tied: bool
    dtype: str
    source: str
    window: int | None = None

    @property
    def parameters(self) -> int:
        """How many parameters the model has, shared ones once."""
        if self.model_type == "gpt2":
            # Attention 4 hidden^2, MLP 8; biases 4 + 5; two layer norms 2 + 2. And one norm last.
            block = 12 * self.hidden**2 + 13 * self.hidden
            embeddings = self.vocabulary + self.context
            return self.layers * block + (embeddings + 2) * self.hidden
        # Query and output have all heads, key and value those that are their own. No bias.
        attention = 2 * self.hidden * self.head_size * (self.heads + self.key_value_heads)
        # The gate, the value and the way back.
        mlp = 3 * self.hidden * self.intermediate
        # A norm before attention and MLP; Gemma 3 has one after each, too. Qwen3 and Gemma 3 norm
        # queries and keys, each head with the same weight.
        norms = (4 if self.model_type == "gemma3_text" else 2) * self.hidden
        if self.model_type in ("qwen3", "gemma3_text"):
            norms += 2 * self.head_size
        embeddings = self.vocabulary * (1 if self.tied else 2)
        return self.layers * (attention + mlp + norms) + (embeddings + 1) * self.hidden

    @property
    def config(self) -> dict:
        """What the model's `config.json` says of it, under the names that transformers reads."""
        if self.model_type == "gpt2":
            return {
                "vocab_size": self.vocabulary,
                "n_positions": self.context,
                "n_embd": self.hidden,
                "n_layer": self.layers,
                "n_head": self.heads,
                "dtype": self.dtype,
            }
        config = {
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.intermediate,
            "tie_word_embeddings": self.tied,
            "dtype": self.dtype,
        }
        # transformers' own default for these two is a window of 4,096.
        if self.model_type in ("mistral", "gemma3_text"):
            config["sliding_window"] = self.window
        return config


@dataclass(frozen=True)
class VisionGeometry:
    """The sizes of a Vision Transformer that tells classes apart.

    Attributes:
        name: what people call it.
        also: further names; the last part of its address on huggingface.co is one.
        image: the height and width of an image, in pixels.
        patch: the height and width of a patch, in pixels.
        classes: how many classes it tells apart.
        hidden: the width of the model.
        layers: how many blocks it has.
        heads: how many attention heads a block has.
        intermediate: the width inside the MLP.
        dtype: the type of the published weights.
        source: where these numbers are from.
    """

    name: str
    also: tuple[str, ...]
    image: int
    patch: int
    classes: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    dtype: str
    source: str
    model_type: str = "vit"

    @property
    def parameters(self) -> int:
        """How many parameters the model has, its classifier included."""
        # Attention 4 hidden^2 with 4 biases, two layer norms 2 + 2; the MLP and its two biases.
        block = 4 * self.hidden**2 + 8 * self.hidden
        block += 2 * self.hidden * self.intermediate + self.intermediate + self.hidden
        embedding = (3 * self.patch**2 + 1) * self.hidden
        # The class token, a position for it and for each patch, and the last norm.
        positions = (self.image // self.patch) ** 2 + 1
        around = (1 + positions + 2) * self.hidden
        return self.layers * block + embedding + around + (self.hidden + 1) * self.classes

    @property
    def config(self) -> dict:
        """What the model's `config.json` says of it, under the names that transformers reads."""
        return {
            "image_size": self.image,
            "patch_size": self.patch,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "num_labels": self.classes,
            "dtype": self.dtype,
        }


Geometry = LanguageGeometry | VisionGeometry


def _gpt2(name: str, also: str, hidden: int, layers: int, heads: int) -> LanguageGeometry:
    return LanguageGeometry(
        name=name,
        also=(also,),
        model_type="gpt2",
        vocabulary=50257,
        context=1024,
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_value_heads=heads,
        head_size=hidden // heads,
        intermediate=4 * hidden,
        tied=True,
        dtype="float32",
        source=f"config.json of openai-community/{also}",
    )


def _llama(
    name: str,
    repository: str,
    context: int,
    sizes: tuple[int, int, int, int, int],
    *,
    vocabulary: int = 128256,
    tied: bool = False,
    dtype: str = "bfloat16",
    model_type: str = "llama",
    head_size: int | None = None,
    window: int | None = None,
    also: tuple[str, ...] = (),
) -> LanguageGeometry:
    """`sizes` are hidden, layers, heads, key-value heads and intermediate."""
    hidden, layers, heads, key_value_heads, intermediate = sizes
    return LanguageGeometry(
        name=name,
        also=(repository.split("/")[-1], *also),
        model_type=model_type,
        vocabulary=vocabulary,
        context=context,
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size or hidden // heads,
        intermediate=intermediate,
        tied=tied,
        dtype=dtype,
        source=f"config.json of {repository}",
        window=window,
    )


def _qwen3(size: str, sizes: tuple[int, int, int, int, int], tied: bool) -> LanguageGeometry:
    return _llama(
        f"Qwen3 {size}",
        f"Qwen/Qwen3-{size}",
        40960,
        sizes,
        vocabulary=151936,
        tied=tied,
        model_type="qwen3",
        # The same for all sizes: the heads together are not as wide as the model.
        head_size=128,
    )


def _vit(name: str, repository: str, hidden: int, layers: int, heads: int) -> VisionGeometry:
    return VisionGeometry(
        name=name,
        also=(repository.split("/")[-1], f"{name}/16"),
        image=224,
        patch=16,
        classes=1000,
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=4 * hidden,
        dtype="float32",
        source=f"config.json of {repository}; Dosovitskiy et al., arXiv 2010.11929, table 1",
    )


GEOMETRIES: tuple[Geometry, ...] = (
    _gpt2("GPT-2 124M", "gpt2", hidden=768, layers=12, heads=12),
    _gpt2("GPT-2 355M", "gpt2-medium", hidden=1024, layers=24, heads=16),
    _gpt2("GPT-2 774M", "gpt2-large", hidden=1280, layers=36, heads=20),
    _gpt2("GPT-2 1558M", "gpt2-xl", hidden=1600, layers=48, heads=25),
    _llama(
        "Llama-2 7B",
        "meta-llama/Llama-2-7b-hf",
        4096,
        (4096, 32, 32, 32, 11008),
        vocabulary=32000,
        dtype="float16",
    ),
    _llama(
        "Llama-2 13B",
        "meta-llama/Llama-2-13b-hf",
        4096,
        (5120, 40, 40, 40, 13824),
        vocabulary=32000,
        dtype="float16",
    ),
    _llama("Llama-3 70B", "meta-llama/Meta-Llama-3-70B", 8192, (8192, 80, 64, 8, 28672)),
    _llama("Llama-3.1 8B", "meta-llama/Llama-3.1-8B", 131072, (4096, 32, 32, 8, 14336)),
    _llama("Llama-3.2 1B", "meta-llama/Llama-3.2-1B", 131072, (2048, 16, 32, 8, 8192), tied=True),
    _llama("Llama-3.2 3B", "meta-llama/Llama-3.2-3B", 131072, (3072, 28, 24, 8, 8192), tied=True),
    _llama(
        "Mistral 7B",
        "mistralai/Mistral-7B-v0.3",
        32768,
        (4096, 32, 32, 8, 14336),
        vocabulary=32768,
        model_type="mistral",
    ),
    _qwen3("0.6B", (1024, 28, 16, 8, 3072), tied=True),
    _qwen3("1.7B", (2048, 28, 16, 8, 6144), tied=True),
    _qwen3("4B", (2560, 36, 32, 8, 9728), tied=True),
    _qwen3("8B", (4096, 36, 32, 8, 12288), tied=False),
    _qwen3("14B", (5120, 40, 40, 8, 17408), tied=False),
    _qwen3("32B", (5120, 64, 64, 8, 25600), tied=False),
    _llama(
        "Gemma 3 1B",
        "google/gemma-3-1b-pt",
        32768,
        (1152, 26, 4, 1, 6912),
        vocabulary=262144,
        tied=True,
        model_type="gemma3_text",
        head_size=256,
        window=512,
    ),
    # The text model alone: the one on the hub has an encoder for images before it.
    _llama(
        "Gemma 3 4B text",
        "google/gemma-3-4b-pt",
        131072,
        (2560, 34, 8, 4, 10240),
        vocabulary=262208,
        tied=True,
        model_type="gemma3_text",
        head_size=256,
        window=1024,
    ),
    _vit("ViT-B", "google/vit-base-patch16-224", hidden=768, layers=12, heads=12),
    _vit("ViT-L", "google/vit-large-patch16-224", hidden=1024, layers=24, heads=16),
)


def find_geometry(name: str) -> Geometry:
    """Return the built-in geometry of this name; case, blanks and punctuation do not count.

    Args:
        name: "Llama-3.1 8B", "meta-llama/Llama-3.1-8B", "gpt2-xl", "ViT-L/16".

    Raises:
        ValueError: no geometry has this name. The nearest ones are said.
    """
    if not isinstance(name, str):
        raise ValueError(f'a model is a name such as "Llama-3.1 8B", not {name!r}')
    by_key = {_key(called): g for g in GEOMETRIES for called in (g.name, *g.also)}
    # An address on huggingface.co has its owner before the name.
    for key in (_key(name), _key(name.split("/")[-1])):
        if key in by_key:
            return by_key[key]
    near = difflib.get_close_matches(_key(name), by_key, n=6, cutoff=0.5)
    names = list(dict.fromkeys(by_key[key].name for key in near))[:3]
    known = names or [geometry.name for geometry in GEOMETRIES]
    said = "The nearest names are" if names else "Known are"
    raise ValueError(f"no model is known as {name!r}. {said}: {', '.join(known)}")


def parameters(name: str) -> int:
    """Return how many parameters a built-in model has, shared ones once.

    Raises:
        ValueError: no geometry has this name.
    """
    return find_geometry(name).parameters


def hugging_face_config(name: str | Path) -> PreTrainedConfig:
    """Return the transformers configuration of a built-in model, or of a local file.

    Nothing is downloaded, and no code that a file names is run. A folder with a `config.json` comes
    before a built-in model of the same name, as it does in transformers.

    Args:
        name: the name of a built-in model ("Llama-3.1 8B"), the path of a `config.json`, or of the
            folder that it is in.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the name is not known; there is no such file; it is not JSON, has no
            `model_type` that transformers knows, names code of its own, or has fields that do not
            suit its type.
    """
    transformers = _transformers()
    path = _config_path(name)
    if path is None:
        geometry = find_geometry(str(name))
        return transformers.AutoConfig.for_model(geometry.model_type, **geometry.config)
    fields = _read(path)
    kind = fields["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} knows no model_type {kind!r}. A newer"
            " transformers may"
        )
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(fields)
    # What a configuration raises for a wrong field is no one type of error.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no configuration of a {kind} model: {reason}") from error


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "a model is built from its configuration by transformers, which is not installed:"
            " pip install transformers"
        ) from error
    return transformers


def _config_path(name: str | Path) -> Path | None:
    """The file that is meant; None where it is a built-in model's name."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.suffix == ".json" or isinstance(name, Path):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file. Nothing is downloaded")
        return path
    return None


def _read(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # what is not UTF-8 is no JSON either
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(
            f'{path} has no "model_type". That of a model on huggingface.co has one, e.g. "llama"'
        )
    if fields.get("auto_map"):
        raise ValueError(
            f'{path} names code of its own ("auto_map"), which is not run here. Without that entry'
            f" it would be read as transformers' own {fields['model_type']}"
        )
    return fields


def _key(name: str) -> str:
    """What is left of a name when case, blanks, punctuation and "Meta-", "-hf" do not count."""
    return re.sub(r"[^a-z0-9]|hf$|^meta-", "", name.lower())
