"""What is shown of the predictions: every row, and the verdict of each card."""

from memlab.will_it_fit.tables import card, lines, on_the_lines, verdicts
from tests.will_it_fit.made_up import TABLE


def test_the_figure_and_the_table_have_the_rows_of_the_lines():
    shown = ["Llama-3.1 8B, full", "Llama-3.1 8B, LoRA", "GPT-2 124M, full"]
    assert on_the_lines(TABLE) == list(TABLE.rows[:3])
    figure = lines(TABLE)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == shown
    assert [f"{row['model']}, {row['training']}" for row in verdicts(TABLE).rows] == shown
    assert figure.get_suptitle().startswith("Predicted")


def test_the_table_says_which_cards_a_run_fits():
    full, lora, _ = verdicts(TABLE).rows
    assert [full[box] for box in ("16 GB", "24 GB", "80 GB", "141 GB")] == [
        "-",
        "-",
        "fits",
        "fits",
    ]
    assert lora["24 GB"] == "fits" and lora["16 GB"] == "-"


def test_the_card_says_what_is_predicted_and_what_is_not_measured():
    text = card(TABLE)
    assert "no record of this loop yet" in text and "predicted for an H100" in text
    assert "full: 41.00 GiB, LoRA: 21.00 GiB" in text
    assert "full: no, yes; LoRA: yes, yes" in text
