"""The registry of tasks: what the classes of a data set are called, and where its rows come from.

The seven downstream sets of the MetaPT paper (section 5.1), Yelp-5, on which its pseudo-labeller is
trained (section 4.1), and the VADER sentences that the quick start uses. Any other set is a local
file (`trainer.options.TaskOptions`).

Words: PPT (Gu et al. 2022, appendix) reads a 2-class set out as bad/good and a 5-class set as
terrible/bad/maybe/good/great. We read the middle class as "okay", which describes something after
"It was", where "maybe" does not; three classes are bad/okay/good, so that all tasks share one
five-word scale and a prompt meta-trained on it starts on familiar words.

Aspect sets: a bundle holds one suffix per task, so what changes per sample cannot stand in the
template. The aspect stands in front of the text instead ("food quality: The pizza was cold."),
where truncation, which cuts the end of the text, leaves it whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve.errors import UserError

TEMPLATE = "{text} It was <extra_id_0>."  # appendix of the paper; PPT uses the same

TWO_WORDS = ("bad", "good")
THREE_WORDS = ("bad", "okay", "good")
FIVE_WORDS = ("terrible", "bad", "okay", "good", "great")

TWO_LABELS = ("negative", "positive")
THREE_LABELS = ("negative", "neutral", "positive")
FIVE_LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
FIVE_STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")

VADER_DOMAINS = ("film", "product", "tweet", "editorial")


@dataclass(frozen=True)
class Hub:
    """Where a data set lies on the Hugging Face hub, and which of its columns are read.

    Attributes:
        id: the data set's repository id.
        config: the configuration of a data set that has several.
        splits: our split name to the hub's.
        text_format: the text of a sample, from the hub's column names.
        label_column: a column of class indices, or of class names (matched without case).
        explode: a column that holds a list of records; each record becomes a row of its own, its
            fields joining the row's columns.
    """

    id: str
    config: str | None = None
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )
    text_format: str = "{text}"
    label_column: str = "label"
    explode: str | None = None


@dataclass(frozen=True)
class Task:
    """A classification task, as the trainer, the exporter and a prompt's `task.json` see it.

    Attributes:
        name: what `--task` takes.
        labels: the C class names shown to people; class i is labels[i].
        words: the C verbalizer words, each one token of the backbone's vocabulary.
        template: what the model reads; `{text}` is replaced.
        text_format: the text of a sample, from the column names of a local file.
        files: names, without suffix, that the set may have in a `--data-dir` folder.
        hub: where the set lies on the Hugging Face hub, if it does.
        drop: class names outside `labels` whose rows are left out instead of refused.
        vader: the domain of the VADER sentences, for the quick start's tasks.
        description: one line for lists and errors.
    """

    name: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    template: str = TEMPLATE
    text_format: str = "{text}"
    files: tuple[str, ...] = ()
    hub: Hub | None = None
    drop: tuple[str, ...] = ()
    vader: str | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise UserError(f"task '{self.name}' has {len(self.labels)} class: it needs at least 2")
        if len(self.labels) != len(self.words):
            raise UserError(
                f"task '{self.name}' has {len(self.labels)} labels ({', '.join(self.labels)}) but "
                f"{len(self.words)} words ({', '.join(self.words)}): pass one word per label"
            )
        for what, values in (("label", self.labels), ("word", self.words)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise UserError(f"task '{self.name}' has the {what} '{twice[0]}' twice")
        if self.template.count("{text}") != 1 or self.template.count("<extra_id_0>") != 1:
            raise UserError(
                f"the template of task '{self.name}' must hold {{text}} and <extra_id_0> once "
                f"each, but is: {self.template}"
            )

    @property
    def registered(self) -> str:
        """Its name in the registry; "" for a task made of a user's file, whatever its name."""
        return self.name if self.files or self.hub or self.vader else ""

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.labels)


# Not `str.format`, which would read the columns "reviews.text" and "Text: body" as an attribute
# and a format.
_COLUMN = re.compile(r"\{([^{}]+)\}")


def format_columns(text_format: str) -> list[str]:
    """The column names that a text format needs, in their order: ["aspect", "text"].

    What stands in braces is a name as it is, whatever its characters.

    Raises:
        UserError: there is no name in braces.
    """
    columns = _COLUMN.findall(text_format)
    if not columns:
        raise UserError(
            f"--text-column {text_format}: a format over columns has their names in braces, such "
            "as '{aspect}: {text}'"
        )
    return columns


_OTHER_COLUMN = "to read another column pass --text-column '{%s}: {text}'"


def check_columns(template: str, advice: str = _OTHER_COLUMN) -> None:
    """Raises: UserError when a template names a column: the text may be made of several.

    Args:
        advice: what to do, in the command's own flags; %s is the column.
    """
    others = [name for name in _COLUMN.findall(template) if name != "text"]
    if others:
        raise UserError(
            f"--template {template}: a template has no place for {{{others[0]}}}, only for "
            "{text}: " + advice.replace("%s", others[0])
        )


def fill_format(text_format: str, values: Mapping[str, str]) -> str:
    """The format with every `{column}` replaced by the column's value."""
    return _COLUMN.sub(lambda column: values[column[1]], text_format)


def readable_aspect(value: str) -> str:
    """An annotation code as words: "FOOD#STYLE_OPTIONS" becomes "food style options".

    A category about nothing in particular ("LAPTOP#GENERAL", "MISCELLANEOUS") keeps its entity
    only, and a value that is no code ("LOCATION1", "transit-location") changes no more than its
    dashes: Sentihood masks its places under names that the text itself uses.
    """
    if "#" in value:
        value = value.lower().removesuffix("#general").removesuffix("#miscellaneous")
    return re.sub(r"[#_-]+", " ", value).strip()


_TASKS: dict[str, Task] = {}


def _register(task: Task) -> None:
    _TASKS[task.name] = task


_register(
    Task(
        "sst5", FIVE_LABELS, FIVE_WORDS,
        files=("sst5",), hub=Hub("SetFit/sst5"),
        description="Stanford Sentiment Treebank, film review sentences (Socher et al. 2013)",
    )
)  # fmt: skip
_register(
    Task(
        "sst2", TWO_LABELS, TWO_WORDS,
        files=("sst2",), hub=Hub("SetFit/sst2"),
        description="Stanford Sentiment Treebank without its neutral sentences",
    )
)  # fmt: skip
_register(
    Task(
        "amazon5", FIVE_STARS, FIVE_WORDS,
        files=("amazon5", "amazon_alexa"), hub=Hub("SetFit/amazon_reviews_multi_en"),
        description="Amazon reviews by stars (McAuley and Leskovec 2013)",
    )
)  # fmt: skip
_register(
    Task(
        "amazon2", TWO_LABELS, TWO_WORDS,
        files=("amazon2", "amazon_polarity"),
        hub=Hub(
            "fancyzhx/amazon_polarity",
            splits={"train": "train", "test": "test"},
            text_format="{title}. {content}",
        ),
        description="Amazon reviews by polarity (Zhang et al. 2015)",
    )
)  # fmt: skip
_register(
    Task(
        "sentihood", TWO_LABELS, TWO_WORDS,
        text_format="{target} {aspect}: {text}", files=("sentihood",),
        hub=Hub(
            "bhavnicksm/sentihood",
            explode="opinions", label_column="sentiment",
            text_format="{target_entity} {aspect}: {text}",
        ),
        description="London neighbourhoods, one opinion per place and aspect (Saeidi et al. 2016)",
    )
)  # fmt: skip
_register(
    Task(
        "semeval-restaurant", THREE_LABELS, THREE_WORDS,
        text_format="{aspect}: {text}", files=("semeval-restaurant", "semeval16_restaurants"),
        hub=Hub(
            # The hub carries the 2014 edition (aspect terms) in this form, not the 2016 one.
            "tomaarsen/setfit-absa-semeval-restaurants",
            splits={"train": "train", "test": "test"}, text_format="{span}: {text}",
        ),
        drop=("conflict",),
        description="SemEval restaurant reviews, one opinion per aspect (2016; from the hub 2014)",
    )
)  # fmt: skip
_register(
    Task(
        "semeval-laptop", THREE_LABELS, THREE_WORDS,
        text_format="{aspect}: {text}", files=("semeval-laptop", "semeval16_laptops"),
        hub=Hub(
            "tomaarsen/setfit-absa-semeval-laptops",
            splits={"train": "train", "test": "test"}, text_format="{span}: {text}",
        ),
        drop=("conflict",),
        description="SemEval laptop reviews, one opinion per aspect (2016; from the hub 2014)",
    )
)  # fmt: skip
_register(
    Task(
        "yelp5", FIVE_STARS, FIVE_WORDS,
        files=("yelp5",),
        hub=Hub("Yelp/yelp_review_full", splits={"train": "train", "test": "test"}),
        description="Yelp reviews by stars (Zhang et al. 2015); trains the pseudo-labeller",
    )
)  # fmt: skip
for _domain in VADER_DOMAINS:
    for _labels, _words in ((TWO_LABELS, TWO_WORDS), (FIVE_LABELS, FIVE_WORDS)):
        _register(
            Task(
                f"vader-{_domain}-{len(_labels)}", _labels, _words, vader=_domain,
                description=f"{_domain} sentences rated by 20 people (Hutto and Gilbert 2014)",
            )
        )  # fmt: skip

# The paper's seven downstream tasks (section 5.1), in the order of its tables.
PAPER_TASKS = (
    "sst5", "sst2", "amazon5", "amazon2", "sentihood", "semeval-restaurant", "semeval-laptop",
)  # fmt: skip


def task_names() -> list[str]:
    """The names of all registered tasks."""
    return list(_TASKS)


def get_task(name: str, flag: str = "--task") -> Task:
    """The registered task of that name.

    Args:
        flag: the flag that named it, for errors.

    Raises:
        UserError: there is none; the message lists what there is.
    """
    if name not in _TASKS:
        raise UserError(
            f"{flag} {name}: no such task; there are {', '.join(_TASKS)}"
            + (", or any local file with --data FILE" if flag == "--task" else "")
        )
    return _TASKS[name]


def make_task(
    name: str,
    labels: Sequence[str],
    words: Sequence[str] | None = None,
    template: str = TEMPLATE,
    description: str = "",
) -> Task:
    """A task that is not registered. Without `words` the labels, in lower case, are the words.

    Raises:
        UserError: labels that cannot serve as words (numbers), or a number of words that is not
            the number of labels.
    """
    if words is None:
        numbers = [label for label in labels if not any(char.isalpha() for char in label)]
        if numbers:
            raise UserError(
                f"task '{name}': the label '{numbers[0]}' says nothing to a language model: pass "
                "--words, one per class (for two sentiment classes: --words bad good)"
            )
        words = [label.lower() for label in labels]
    return Task(name, tuple(labels), tuple(words), template, description=description)
