"""The two Python models of a Triton repository; `exporter.triton` copies them there as they are.

Each stands in a version's folder as `model.py`, beside a copy of what it needs of `serve`, under
the name `metapt_text`. Triton's image needs `tokenizers` and numpy for them, and nothing of ours.
"""
