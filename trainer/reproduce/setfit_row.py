"""SetFit (Tunstall et al. 2022) on a sentence encoder: what one would take instead of a prompt.

The `setfit` package with its own defaults (contrastive pairs, 20 a sample, one epoch, batches of
16, a logistic regression on top), trained on the same samples. It takes no validation samples.
"""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import numpy as np

from serve.errors import UserError, install
from trainer.data import Examples
from trainer.embed import encoder_source

ITERATIONS = 20  # pairs a sample and polarity, the paper's R (section 4.2)


def check_setfit() -> None:
    """Raises: UserError when the package is not installed; said before hours of other rows."""
    if importlib.util.find_spec("setfit") is None:
        raise UserError(
            f"the row of SetFit needs its package: {install('setfit')}, or "
            "leave setfit out of --methods"
        )


def run_setfit(
    train: Examples, test: Examples, seed: int, encoder: str | None, device: str
) -> dict[str, Any]:
    """Train on the samples, evaluate on the test rows; see `check_setfit`."""
    from datasets import Dataset
    from datasets import disable_progress_bars as quiet_datasets
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.metrics import f1_score
    from transformers import PrinterCallback, ProgressCallback

    quiet_datasets()
    model = SetFitModel.from_pretrained(encoder_source(encoder), device=device)
    with tempfile.TemporaryDirectory() as scratch:  # its checkpoints, which nobody needs
        arguments = TrainingArguments(
            output_dir=scratch, batch_size=16, num_iterations=ITERATIONS, num_epochs=1, seed=seed,
            report_to="none", save_strategy="no", show_progress_bar=False,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": train.texts, "label": train.labels.tolist()})
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        for callback in (ProgressCallback, PrinterCallback):  # the table has a bar of its own
            trainer.remove_callback(callback)
        trainer.train()
    predicted = np.asarray(model.predict(test.texts, show_progress_bar=False))
    return {
        "accuracy": float((predicted == test.labels).mean()),
        "macro_f1": float(f1_score(test.labels, predicted, average="macro", zero_division=0)),
        "rows": len(test),
        "steps": 2 * ITERATIONS * len(train) // 16,
    }
