"""From what was given to what is planned: names, files, configurations and runs, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from memlab.run import check_run
from memlab.workloads.geometries import hugging_face_config
from memlab.workloads.quiet import quiet_libraries

from .script import Model
from .subject import ModelSubject, RunSubject
from .switches import SWITCHES


def subject_of(
    model: object,
    batch: int,
    sequence: int | None,
    lora: int | None,
    options: Mapping[str, object],
) -> ModelSubject | RunSubject:
    """Find out what is to be planned, and check what was given with it.

    Args:
        model: as for `plan`.
        batch, sequence, lora, options: likewise.

    Raises:
        ValueError: what is wrong, and what to do.
        ImportError: transformers, or for LoRA PEFT, is not installed.
    """
    _check_whole("batch", batch)
    if lora is not None:
        _check_whole("lora, the adapters' rank,", lora)
    if callable(model) and not isinstance(model, (type, torch.nn.Module)):
        return _run_subject(model, batch, sequence, lora, options)
    if options:
        raise ValueError(f"{', '.join(options)}: only a run has options, and {model!r:.60} is none")
    config, name, source = _config_of(model)
    found = _model_of(config, name, source)
    if found.images:
        if sequence is not None:
            raise ValueError(f"{name} takes images: leave sequence out, not {sequence!r}")
    else:
        if sequence is None:
            raise ValueError(f"{name} takes tokens: say how many a row has, sequence=2048")
        _check_whole("sequence", sequence)
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and sequence > longest:
            raise ValueError(
                f"{name} is made for at most {longest:,} tokens in a row, and sequence is"
                f" {sequence:,}"
            )
    if lora is not None:
        _check_peft()
    return ModelSubject(found, batch, sequence or 0, lora)


def _run_subject(
    run: Callable,
    batch: int,
    sequence: int | None,
    lora: int | None,
    options: Mapping[str, object],
) -> RunSubject:
    if lora is not None:
        raise ValueError("lora is for a model: a run makes its own adapters")
    # Batch and sequence are options like others, if it has them.
    parameters = inspect.signature(run).parameters
    chosen = dict(options)
    for name, value in (("batch", batch), ("sequence", sequence)):
        if name in parameters and value is not None:
            chosen[name] = value
    check_run(run, chosen)
    subject = RunSubject(run, chosen)
    if not subject.switches:
        names = ", ".join(switch.options[0] for switch in SWITCHES)
        raise ValueError(
            f"the run has no option that is a switch. One is named like a technique and is False"
            f" by default: {names}"
        )
    return subject


def _config_of(model: object) -> tuple[object, str, str]:
    """The configuration, what people call the model, and the expression that gives it."""
    if isinstance(model, (str, Path)):
        config = hugging_face_config(model)
        return config, str(model), f"hugging_face_config({str(model)!r})"
    if isinstance(model, torch.nn.Module):
        raise ValueError(
            "plan() was given a model that is there already. Give it its configuration,"
            " plan(model.config, ...), or the run that trains it"
        )
    if not hasattr(model, "model_type") or not hasattr(model, "to_diff_dict"):
        raise ValueError(
            'a model is a name ("Llama-3.1 8B"), the path of a config.json, a configuration of'
            f" transformers or a run, not {model!r:.60}"
        )
    fields = model.to_diff_dict()
    for name in ("model_type", "transformers_version"):
        fields.pop(name, None)
    source = f"AutoConfig.for_model({model.model_type!r}, **{fields!r})"
    return model, type(model).__name__.removesuffix("Config"), source


def _model_of(config: object, name: str, source: str) -> Model:
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    language = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if not language and not images:
        raise ValueError(
            f"{name} is a {kind} model. A plan's script trains language models and image"
            " classifiers; for others give plan() your own run"
        )
    auto = "AutoModelForCausalLM" if language else "AutoModelForImageClassification"
    return Model(
        name=name,
        config_source=source,
        auto_class=auto,
        sixteen_bits=str(config.dtype).removeprefix("torch.") in ("bfloat16", "float16"),
        parameters=_count(auto, config),
        images=not language,
    )


def _count(auto: str, config: object) -> int:
    """How many numbers the model has: it is built on the meta device, where that costs nothing."""
    with quiet_libraries(), torch.device("meta"):
        import transformers

        model = getattr(transformers, auto).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} has to be a whole number of at least 1, not {value!r}")


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "LoRA's adapters are made by PEFT, which is not installed: pip install peft"
        ) from error
