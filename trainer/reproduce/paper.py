"""What the paper printed, as far as it is legible (Huang, Qian and Yu 2022, accuracy in per cent).

Only these figures are known to us; an absent one is unknown, not zero. They are of T5-base unless a
name says T5-large, on the paper's test sets, and stand beside ours for orientation.
"""

from __future__ import annotations

# (mean, deviation); a deviation that is not legible is None
Figure = tuple[float, float | None]

SOURCE = "Huang, Qian, Yu: Learning a Better Initialization for Soft Prompts via Meta-Learning"

# Table 1, T5-base: row -> task -> figure
TABLE1: dict[str, dict[str, Figure]] = {
    "FT": {"semeval-laptop": (62.48, 3.23)},
    "PPT": {"sst5": (42.89, 1.08), "semeval-laptop": (56.37, 4.11)},
    "MetaPT": {"sst5": (46.24, 0.42), "semeval-laptop": (70.86, 1.95)},
    "MetaPT(Y)": {"semeval-laptop": (72.32, 0.66)},
    # Table 1, T5-large
    "MetaPT, T5-large": {
        "sst5": (47.31, None),
        "sst2": (89.61, None),
        "amazon5": (55.76, None),
        "amazon2": (95.23, None),
        "sentihood": (85.78, None),
        "semeval-restaurant": (85.96, None),
        "semeval-laptop": (77.49, None),
    },
}

# Table 2, T5-base on SST-5: how the source texts are grouped
TABLE2: dict[str, dict[str, Figure]] = {
    "MetaPT, K-means": {"sst5": (46.24, 0.42)},
    "MetaPT, LDA": {"sst5": (44.10, 0.83)},
    "MetaPT, random": {"sst5": (42.95, 1.05)},
    "MetaPT, label": {"sst5": (42.84, 0.76)},
    "PPT": {"sst5": (42.89, 1.08)},
}

PRINTED = {"table1": TABLE1, "table2": TABLE2}
