"""Questions about a text, in many wordings and with many label words.

A *question* reads one label column of a text (its polarity, its stars, where it comes from).
It can be asked in words around the text, or by a learned soft prompt in front of it; in both
cases the answer is one word at the sentinel `<extra_id_0>`. A wording has at most two slots
besides `{text}`: `{words}`, which lists the label words (in a random order, so that only their
meaning or the mapping said in the wording counts), and none.

`HELD_OUT` wordings are never trained; they measure steering by words.
"""

from dataclasses import dataclass

from trainer.tasks import TEMPLATE

SENTINEL = "<extra_id_0>"

OPINIONS = ("polarity", "tone", "star")  # label columns


@dataclass(frozen=True)
class Question:
    """One question.

    name: key of the auxiliary head and of the soft prompts.
    column: label column of the pools; class c of the column is word c of a label-word set.
    weight: share among all supervised examples.
    words: label-word sets whose meaning says the class; each is one soft task.
    fixed: (wording, label words) where the wording itself implies the words.
    listing: wordings with `{words}`, used with any set of `words`.
    arbitrary: label-word sets without meaning, for soft tasks only.
    """

    name: str
    column: str
    weight: float
    words: tuple[tuple[str, ...], ...]
    fixed: tuple[tuple[str, tuple[str, ...]], ...]
    listing: tuple[str, ...]
    arbitrary: tuple[tuple[str, ...], ...] = ()


_OPINION_LISTING = (
    "{text} {words}? <extra_id_0>",
    "{words}? {text} <extra_id_0>",
    "is this {words}? {text} answer: <extra_id_0>",
    "classify the opinion as {words}: {text} <extra_id_0>",
    "{text} the opinion above is {words}: <extra_id_0>",
    "review: {text} options: {words} answer: <extra_id_0>",
    "choose {words}. text: {text} choice: <extra_id_0>",
)

_TOPIC_LISTING = (
    "{text} {words}? <extra_id_0>",
    "{words}? {text} <extra_id_0>",
    "choose {words}. text: {text} choice: <extra_id_0>",
    "text: {text} options: {words} answer: <extra_id_0>",
)

# In the order of the classes `genre` and `ware` of recipe.toml.
_GENRES = tuple("film restaurant hotel product medicine flight news novel history science".split())
_WARES = tuple("books video electronics kitchen phone computer makeup".split())

QUESTIONS: tuple[Question, ...] = (
    Question(
        name="polarity",
        column="polarity",
        weight=0.44,
        words=(
            ("terrible", "great"),
            ("negative", "positive"),
            ("bad", "good"),
            ("awful", "excellent"),
            ("horrible", "wonderful"),
            ("poor", "fine"),
            ("sad", "happy"),
            ("hate", "love"),
        ),
        fixed=(
            (TEMPLATE, ("terrible", "great")),
            (TEMPLATE, ("terrible", "great")),
            (TEMPLATE, ("terrible", "great")),
            ("it was <extra_id_0>. {text}", ("terrible", "great")),
            ("<extra_id_0>! {text}", ("terrible", "great")),
            ("{text} in summary, it was <extra_id_0>.", ("terrible", "great")),
            ("{text} sentiment: <extra_id_0>", ("negative", "positive")),
            ("sentiment of the text: {text} <extra_id_0>", ("negative", "positive")),
            ("{text} the writer feels <extra_id_0> about it.", ("negative", "positive")),
            ("{text} a <extra_id_0> thing.", ("bad", "good")),
            ("{text} how was it? <extra_id_0>", ("bad", "good")),
            ("how good is it? {text} <extra_id_0>", ("awful", "excellent")),
            ("{text} i <extra_id_0> it.", ("hate", "love")),
            ("{text} i am <extra_id_0>.", ("sad", "happy")),
            ("is this positive? {text} <extra_id_0>", ("no", "yes")),
            ("{text} is this positive? <extra_id_0>", ("no", "yes")),
            ("is this negative? {text} <extra_id_0>", ("yes", "no")),
            ("{text} is this negative? <extra_id_0>", ("yes", "no")),
            ("{text} would you recommend it? <extra_id_0>", ("no", "yes")),
            ("is the writer unhappy? {text} <extra_id_0>", ("yes", "no")),
            ("true or false: the writer likes it. {text} <extra_id_0>", ("false", "true")),
            ("{text} true or false: the writer hates it. <extra_id_0>", ("true", "false")),
            ("{text} say the opposite: it was <extra_id_0>.", ("great", "terrible")),
            ("a for bad, b for good: {text} <extra_id_0>", ("a", "b")),
            ("a for good, b for bad: {text} <extra_id_0>", ("b", "a")),
            ("{text} thumbs up or down? thumbs <extra_id_0>", ("down", "up")),
        ),
        listing=_OPINION_LISTING,
        arbitrary=(
            ("a", "b"),
            ("b", "a"),
            ("no", "yes"),
            ("yes", "no"),
            ("one", "two"),
            ("red", "blue"),
            ("great", "terrible"),
            ("false", "true"),
        ),
    ),
    Question(
        name="tone",
        column="tone",
        weight=0.22,
        words=(
            ("negative", "neutral", "positive"),
            ("terrible", "okay", "great"),
            ("bad", "okay", "good"),
            ("bad", "average", "good"),
            ("sad", "fine", "happy"),
        ),
        fixed=(
            ("{text} tone: <extra_id_0>", ("negative", "neutral", "positive")),
            ("tone of the text: {text} <extra_id_0>", ("negative", "neutral", "positive")),
            ("{text} all in all it was <extra_id_0>.", ("terrible", "okay", "great")),
            ("bad, okay or good: {text} <extra_id_0>", ("bad", "okay", "good")),
        ),
        listing=_OPINION_LISTING,
        arbitrary=(("a", "b", "c"), ("three", "one", "two")),
    ),
    Question(
        name="stars",
        column="star",
        weight=0.17,
        words=(
            ("terrible", "bad", "okay", "good", "great"),
            ("1", "2", "3", "4", "5"),
            ("awful", "poor", "fine", "good", "excellent"),
            ("one", "two", "three", "four", "five"),
        ),
        fixed=(
            ("{text} stars: <extra_id_0>", ("1", "2", "3", "4", "5")),
            ("rate from 1 to 5: {text} <extra_id_0>", ("1", "2", "3", "4", "5")),
            ("{text} i give it <extra_id_0> stars.", ("one", "two", "three", "four", "five")),
            ("{text} overall it was <extra_id_0>.", ("terrible", "bad", "okay", "good", "great")),
        ),
        listing=_OPINION_LISTING,
    ),
    Question(
        name="subjective",
        column="subjective",
        weight=0.06,
        words=(("objective", "subjective"), ("fact", "opinion"), ("story", "review")),
        fixed=(
            ("{text} is this an opinion? <extra_id_0>", ("no", "yes")),
            ("is this a fact? {text} <extra_id_0>", ("yes", "no")),
            ("{text} this is a <extra_id_0>.", ("fact", "opinion")),
        ),
        listing=_TOPIC_LISTING,
        arbitrary=(("a", "b"), ("no", "yes")),
    ),
    Question(
        name="genre",
        column="genre",
        weight=0.05,
        words=(_GENRES,),
        fixed=(
            ("{text} topic: <extra_id_0>", _GENRES),
            ("what is this about? {text} <extra_id_0>", _GENRES),
        ),
        listing=("{text} topic: <extra_id_0>",),
    ),
    Question(
        name="ware",
        column="ware",
        weight=0.02,
        words=(_WARES,),
        fixed=(("{text} which product? <extra_id_0>", _WARES),),
        listing=("{words}? {text} <extra_id_0>",),
    ),
    Question(
        name="length",
        column="long",
        weight=0.02,
        words=(("short", "long"), ("small", "large")),
        fixed=(
            ("{text} is this text long? <extra_id_0>", ("no", "yes")),
            ("how long is it? {text} <extra_id_0>", ("short", "long")),
        ),
        listing=_TOPIC_LISTING,
    ),
    Question(
        name="follows",
        column="follows",
        weight=0.02,
        words=(("no", "yes"), ("wrong", "right")),
        fixed=(
            ("{text} does the second sentence follow the first? <extra_id_0>", ("no", "yes")),
            ("is this one text? {text} <extra_id_0>", ("no", "yes")),
        ),
        listing=(),
    ),
)

# What a text is about, among words that clusters of texts are named by (`topics`).
ABOUT: tuple[str, ...] = (
    "{text} It was about <extra_id_0>.",
    TEMPLATE,
    "{text} This is about <extra_id_0>.",
    "{text} topic: <extra_id_0>",
    "<extra_id_0>: {text}",
    "{text} {words}? <extra_id_0>",
    "{words}? {text} <extra_id_0>",
    "choose {words}. text: {text} choice: <extra_id_0>",
)

# Never trained. polarity: (wording, words); used by the tracking during training.
HELD_OUT: tuple[tuple[str, tuple[str, str]], ...] = (
    ("{text} to sum up, this is <extra_id_0>.", ("bad", "good")),
    ("what does the author think? <extra_id_0>. {text}", ("negative", "positive")),
    ("{text} did they enjoy it? <extra_id_0>", ("no", "yes")),
    ("my feelings are <extra_id_0>: {text}", ("negative", "positive")),
)


def opinion_words() -> set[str]:
    """The label words of questions about opinions."""
    asked = [q for q in QUESTIONS if q.column in OPINIONS]
    return {word for q in asked for group in q.words for word in group}


def label_words() -> list[str]:
    """Every word which must be one piece of the vocabulary, in a stable order."""
    extra = (
        "terrible bad okay good great negative neutral positive mixed very yes no 1 2 3 4 5 "
        "awful poor fine excellent wonderful horrible hate love happy sad true false maybe "
        "boring amazing best worst average nice like dislike angry calm buy sell up down "
        "food service price location safety staff quality sport business politics technology "
        "entertainment world health normal urgent question complaint praise request other"
    ).split()
    found: dict[str, None] = {}
    for question in QUESTIONS:
        for group in (*question.words, *question.arbitrary, *(w for _, w in question.fixed)):
            found.update(dict.fromkeys(group))
    found.update(dict.fromkeys(extra))
    for _, group in HELD_OUT:
        found.update(dict.fromkeys(group))
    return list(found)
