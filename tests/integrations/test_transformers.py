"""The callback, in the Trainer of Hugging Face and in those of TRL."""

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from memlab import receipt  # noqa: E402 - after what may be missing
from memlab.integrations.transformers import MemlabCallback  # noqa: E402
from memlab.techniques.compilation_and_fusion import apply_fused_loss  # noqa: E402
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing  # noqa: E402
from memlab.watch import watch  # noqa: E402
from tests.helpers import columns_alive, count_parameters  # noqa: E402

WORDS = 64
ROWS, TOKENS, BATCH = 16, 24, 4

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def model():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1, **{f"w{number}": number for number in range(2, WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>"
    )


def text(start, words):
    return " ".join(f"w{(start + number) % (WORDS - 2) + 2}" for number in range(words))


def trainer(folder, callback, **options):
    data = [
        {"input_ids": tokens, "labels": tokens} for tokens in torch.randint(WORDS, (ROWS, TOKENS))
    ]
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        **QUIET,
        **options,
    )
    return transformers.Trainer(
        model(),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback],
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
    )


def test_steps_and_the_evaluation_are_measured(tmp_path, capsys):
    callback = MemlabCallback(2, 3, report=tmp_path / "report.html", save=tmp_path / "kept.json")
    before = columns_alive()
    training = trainer(tmp_path, callback, max_steps=4, eval_strategy="steps", eval_steps=4)
    training.train()
    steps, evaluation = callback.measurements["steps"], callback.measurements["evaluation"]

    weights = 4 * count_parameters(training.model)
    for measurement in (steps, evaluation):
        came = {name: size - before[name] for name, size in measurement.columns.items()}
        assert came["parameters"] == weights
        # Two moments of each, and a counter for each parameter.
        counters = 4 * len(list(training.model.parameters()))
        assert came["optimizer_state"] == 2 * weights + counters
    # The evaluation keeps all predictions, and `cat` needs the old ones beside the new ones.
    assert evaluation.known_bytes > steps.known_columns["parameters"] + ROWS * TOKENS * WORDS * 4
    assert steps.columns["activations"] > 10 * evaluation.columns["activations"]

    said = capsys.readouterr().out
    assert "memlab: the receipt of the steps\nPeak " in said
    assert "memlab: the receipt of the evaluation\nPeak " in said
    assert "the steps" in (tmp_path / "report.html").read_text()
    assert "the evaluation" in (tmp_path / "report.evaluation.html").read_text()
    assert receipt.load(tmp_path / "kept.evaluation.json").peak_bytes == evaluation.peak_bytes

    logged = {key: entry for entry in training.state.log_history for key in entry}
    assert logged["memlab/steps/peak"]["memlab/steps/peak"] == steps.peak_bytes
    assert logged["memlab/steps/peak"]["step"] == 3
    parameters = logged["memlab/evaluation/parameters"]["memlab/evaluation/parameters"]
    assert parameters == evaluation.columns["parameters"]


def test_metrics_go_through_the_trainers_log_and_its_own_stay(tmp_path):
    callback = MemlabCallback(1, 2, evaluation=False)
    training = trainer(tmp_path, callback, max_steps=3, logging_steps=1)
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **more):
            seen.append(dict(logs))

    training.remove_callback(callback)
    training.add_callback(Reporter())
    training.add_callback(MemlabCallback(1, 2, evaluation=False, log=training.log))
    training.train()
    assert sum("memlab/steps/peak" in logs for logs in seen) == 1
    assert sum("loss" in logs for logs in seen) == 3


def test_an_evaluation_alone_is_measured_from_its_second_batch_on(tmp_path):
    callback = MemlabCallback()
    trainer(tmp_path, callback).evaluate()
    assert list(callback.measurements) == ["evaluation"]


def test_a_training_of_fewer_steps_ends_what_is_watched(tmp_path):
    callback = MemlabCallback(1, 100, evaluation=False)
    trainer(tmp_path, callback, max_steps=2).train()
    assert list(callback.measurements) == ["steps"]


def test_after_an_error_the_receipt_is_there_on_demand(tmp_path, capsys):
    callback = MemlabCallback(1, 100)
    training = trainer(tmp_path, callback, max_steps=3)
    training.train_dataset[2]["labels"] = torch.tensor([WORDS + 1] * TOKENS)  # no such word
    with pytest.raises(IndexError):
        training.train()
    assert callback.measurements == {}
    callback.finish()
    assert callback.measurements["steps"].columns["activations"] > 0
    assert "the receipt of the steps" in capsys.readouterr().out
    callback.finish()
    with watch():  # nothing is being measured any more
        pass


@pytest.mark.parametrize(
    ("steps", "message"),
    [((0, 3), "first_step has to be"), ((4, 3), "at least 4, not 3"), ((1, 2.0), "last_step")],
)
def test_steps_that_there_are_not_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        MemlabCallback(*steps)


# TRL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def data(**columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def test_sft(tmp_path, trl):
    arguments = trl.SFTConfig(
        tmp_path, per_device_train_batch_size=BATCH, max_steps=3, bf16=False, max_length=32, **QUIET
    )
    before = columns_alive()
    callback = MemlabCallback(1, 2)
    training = trl.SFTTrainer(
        model(),
        arguments,
        train_dataset=data(text=[text(row, 20) for row in range(ROWS)]),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    training.train()
    columns = callback.measurements["steps"].columns
    weights = 4 * count_parameters(training.model)
    assert columns["parameters"] - before["parameters"] == weights
    assert columns["optimizer_state"] - before["optimizer_state"] > 2 * weights


def test_a_technique_that_the_trainer_goes_round_says_so(tmp_path, trl):
    arguments = trl.SFTConfig(
        tmp_path, per_device_train_batch_size=BATCH, max_steps=1, bf16=False, max_length=32, **QUIET
    )
    trained = model()
    fused, checkpointed = apply_fused_loss(trained), apply_gradient_checkpointing(trained)
    trl.SFTTrainer(
        trained,
        arguments,
        train_dataset=data(text=[text(row, 20) for row in range(ROWS)]),
        processing_class=tokenizer(),
    ).train()
    assert checkpointed.never_used == []
    # It computes the logits of the tokens that count itself, from the output layer's weight.
    assert fused.never_used == ["lm_head"]
    with pytest.warns(UserWarning, match="Never used: lm_head"):
        fused.remove()


def test_dpo_counts_both_models(tmp_path, trl):
    arguments = trl.DPOConfig(
        tmp_path, per_device_train_batch_size=BATCH, max_steps=3, bf16=False, max_length=32, **QUIET
    )
    before = columns_alive()
    callback = MemlabCallback(1, 2)
    training = trl.DPOTrainer(
        model(),
        ref_model=model(),
        args=arguments,
        train_dataset=data(
            prompt=[text(row, 6) for row in range(ROWS)],
            chosen=[text(row + 1, 12) for row in range(ROWS)],
            rejected=[text(row + 2, 12) for row in range(ROWS)],
        ),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    training.train()
    weights = 4 * count_parameters(training.model)
    parameters = callback.measurements["steps"].columns["parameters"]
    assert parameters - before["parameters"] == 2 * weights
