"""What is predicted for the cards of the lessons: `results/lessons/predicted.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from memlab.forms import Bytes, Count, Model, Text, in_words, replace

#: The folder of what belongs to the lessons, in a checkout. The results files in it have the form
#: of those one folder above.
LESSONS = "results/lessons"

PREDICTED = f"{LESSONS}/predicted.json"


class PredictedRun(Model):
    """One run, as it is predicted.

    Attributes:
        peak_bytes: the most that tensors hold.
        needed_bytes: by a GPU's name, what the process needs on it.
        columns: the peak's bytes by column.
        phase: the phase of the peak.
    """

    peak_bytes: Count
    needed_bytes: dict[Text, Count]
    columns: dict[Text, Annotated[int, Field(ge=0)]]
    phase: Text


class PredictedCard(Model):
    """A card's row: one loop without the technique, and with it.

    Attributes:
        notebook: the lesson's name.
        what: what is trained, in words.
        before, after: the two runs.
        free_bytes: by a GPU's name, the bytes that it has.
        torch: the version that predicted it.
        date: when.
    """

    notebook: Text
    what: Text
    before: PredictedRun
    after: PredictedRun
    free_bytes: dict[Text, Bytes]
    torch: Text
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    def fits(self, run: PredictedRun, gpu: str) -> bool:
        """Whether a run fits a GPU."""
        return run.needed_bytes[gpu] <= self.free_bytes[gpu]


class PredictedCards(Model):
    """What the file holds."""

    cards: list[PredictedCard]


def load_cards(root: Path) -> dict[str, PredictedCard]:
    """Read what a checkout has, by the lesson's name; nothing where there is no file.

    Raises:
        ValueError: the file is not valid; the message says where.
    """
    path = Path(root) / PREDICTED
    if not path.is_file():
        return {}
    try:
        cards = PredictedCards.model_validate_json(path.read_bytes()).cards
    except ValidationError as error:
        raise ValueError(f"{PREDICTED}: {in_words(error)}") from error
    return {card.notebook: card for card in cards}


def keep_card(root: Path, card: PredictedCard) -> Path:
    """Put a card into the file, in the place of an older one of the same lesson.

    Returns:
        The file.
    """
    cards = load_cards(root) | {card.notebook: card}
    path = Path(root) / PREDICTED
    kept = PredictedCards(cards=[cards[name] for name in sorted(cards)])
    replace(path, kept.model_dump_json(indent=2) + "\n")
    return path
