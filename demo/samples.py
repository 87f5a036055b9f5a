"""Example sentences for the page, by what a task's name speaks of."""

from __future__ import annotations

_GENERAL = [
    "I would do it again tomorrow.",
    "It broke on the second day and nobody answers.",
    "Not bad, but I had hoped for more.",
]
_BY_DOMAIN = {
    "film": [
        "Two hours that feel like ten minutes, with a cast at its best.",
        "The jokes are older than the director, and slower.",
        "Handsomely shot, but there is nobody in it to care about.",
    ],
    "product": [
        "Charges in an hour and the screen is gorgeous.",
        "The zip came off before I had left the shop.",
        "Does what it says, though the manual is a riddle.",
    ],
    "tweet": [
        "best gig of the year, still smiling!!",
        "train cancelled again, thanks for nothing",
        "well, at least the coffee was warm :/",
    ],
    "editorial": [
        "The reform is overdue, and the council deserves credit for it.",
        "Once more the minister offers a slogan where a plan was promised.",
        "Both sides have a point, and neither has a budget.",
    ],
    "restaurant": [
        "The soup alone is worth the walk.",
        "We waited an hour for cold noodles.",
        "Lovely room, forgettable food.",
    ],
    "topic": [
        "The cabin was cold and they lost my suitcase.",
        "Take one tablet after breakfast; it gave me a headache.",
        "Our room looked over the harbour, and breakfast was included.",
    ],
    "fact": [
        "The committee met on Tuesday to discuss the budget.",
        "A lazy sequel that insults everyone who liked the first one.",
        "The library opens at nine and closes at six.",
    ],
    "opposite": [
        "The best thing I have bought in years.",
        "A waste of money and of an evening.",
        "It could not have gone better.",
    ],
}
_DOMAIN_OF = {
    "sst": "film", "movie": "film", "mr": "film", "amazon": "product", "laptop": "product",
    "yelp": "restaurant", "food": "restaurant", "twitter": "tweet",
}  # fmt: skip


def samples(task: str) -> list[str]:
    """Three sentences for a task of that name."""
    name = task.lower()
    for domain, texts in _BY_DOMAIN.items():
        if domain in name:
            return texts
    for part, domain in _DOMAIN_OF.items():
        if part in name:
            return _BY_DOMAIN[domain]
    return _GENERAL
