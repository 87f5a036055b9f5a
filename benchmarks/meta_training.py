"""MetaPT's outer step: all tasks in one batch, against a loop over tasks.

    python -m benchmarks.meta_training --threads 2 --out runs/meta_training

Both sides take one exact second-order outer step (equations 1 and 2) on the same rows, from the
same prompt, over the same frozen weights:

- batched: `trainer.meta.outer_losses`, differentiated;
- loop: what one would write today with Hugging Face's model and learn2learn's pattern: for each
  task the prompt is cloned, `[prompt; text]` goes through the model as `inputs_embeds`, the support
  loss is differentiated with `create_graph`, the clone takes its step, and the query loss is
  back-propagated. Frozen weights take no gradients on this side either, each task is padded to its
  own longest text, and in mode `prefix` the model gets the same mask as a 4-D attention mask.

Equal gradients are shown first, in float64 (to 1e-6) and in float32 (to its own rounding, which a
deep double backward makes larger than that of one forward), then both sides are timed in turn in
one run; medians are reported. Random weights: time does not depend on their values. On a GPU, with
bf16, CUDA graphs and memory: `benchmarks.meta_gpu`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from serve.cli import guarded
from serve.files import atomic_write, write_json
from trainer.meta import Outcome, ScoreFn, Stages, outer_losses
from trainer.modes import Params
from trainer.readout import Batch, class_scores, collate
from trainer.t5 import FrozenT5

GEOMETRIES = {
    # v1.0 small to 3B (Raffel et al. 2020, sections 3.1.2 and 3.7), and one for a try
    "small": {"d_model": 512, "d_ff": 2048, "num_heads": 8, "d_kv": 64, "num_layers": 6},
    "base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "d_kv": 64, "num_layers": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "d_kv": 64, "num_layers": 24},
    "xl": {"d_model": 1024, "d_ff": 16384, "num_heads": 32, "d_kv": 128, "num_layers": 24},
    "tiny": {"d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "num_layers": 2},
}
DECODER_IDS = (0, 5)  # start and blank; which ids they are does not matter here
WORDS = (11, 12, 13, 14, 15)
INNER_RATE = 0.08
CHECKS = ("float64", "float32", "rounding")
PARITY_TASKS = 3  # of the check that both sides agree: more tell no more


@dataclass
class Setting:
    """Sizes of a step: T tasks, M support and M query rows each, P prompt tokens."""

    tasks: int = 10
    samples: int = 4
    prompt_tokens: int = 100


def make_model(name: str, dtype: torch.dtype, device: str = "cpu") -> T5ForConditionalGeneration:
    """Random weights in a geometry, or `mini` as it ships."""
    if name == "mini":
        from trainer.backbone import load_backbone

        return load_backbone("mini", dtype=dtype, device=device).t5.model
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, decoder_start_token_id=0, dropout_rate=0.0, **GEOMETRIES[name]
    )
    config._attn_implementation = "eager"  # fused attention has no second derivative
    with torch.device(device):  # drawn there: a CPU takes minutes for three billion
        model = T5ForConditionalGeneration(config)
    return model.to(dtype).eval().requires_grad_(False)


def make_rows(setting: Setting, vocabulary: int) -> tuple[list[list[int]], np.ndarray]:
    """Support rows of all tasks, then query rows, with lengths as review sentences have them."""
    generator = np.random.default_rng(0)
    count = 2 * setting.tasks * setting.samples
    # SST-2's sentences: 19 words on average, about 25 tokens with the template's six.
    lengths = np.clip(generator.gamma(4.0, 6.5, count).astype(int), 8, 64)
    rows = [generator.integers(100, vocabulary - 100, n).tolist() for n in lengths]
    return rows, generator.integers(0, len(WORDS), count)


def part(rows: list[list[int]], labels: np.ndarray, start: int, count: int) -> Batch:
    """Rows start ... start + count, padded to the longest of them."""
    return collate(rows[start : start + count], labels[start : start + count])


def widened(scores: Tensor) -> Tensor:
    """Half precision to fp32, as a loss wants it."""
    return scores.float() if scores.dtype == torch.bfloat16 else scores


class Batched:
    """Our side."""

    def __init__(self, model: T5ForConditionalGeneration, mode: str, setting: Setting):
        self.t5, self.mode, self.setting = FrozenT5(model), mode, setting
        rows, labels = make_rows(setting, model.config.vocab_size)
        half = len(rows) // 2
        self.support, self.query = part(rows, labels, 0, half), part(rows, labels, half, half)
        self.words, self.decoder_ids = torch.tensor(WORDS), torch.tensor(DECODER_IDS)

    def to(self, device: str) -> Batched:
        self.support, self.query = self.support.to(device), self.query.to(device)
        self.words, self.decoder_ids = self.words.to(device), self.decoder_ids.to(device)
        return self

    def _score(self, mode: str) -> ScoreFn:
        def score(params: Params, batch: Batch) -> Tensor:
            own = self._cast(params)
            return widened(class_scores(self.t5, mode, own, batch, self.words, self.decoder_ids))

        return score

    def _cast(self, params: Params) -> Params:
        """In the weights' type, to which the products would not bring an fp32 prompt by itself."""
        dtype = self.t5.model.shared.weight.dtype
        return {name: value.to(dtype) for name, value in params.items()}

    def _stages(self) -> Stages | None:
        def constants(params: Params) -> Params:
            kv, states = self.t5.prefix(self._cast(params)["prompt_embeddings"])
            return {"kv": kv, "states": states}

        return Stages(constants, self._score("deep")) if self.mode == "prefix" else None

    def losses(self, params: Params, support: Batch, query: Batch) -> tuple[Tensor, Tensor]:
        """As `trainer.meta.outer_losses`."""
        return outer_losses(
            self._score(self.mode), params, support, query, self.setting.tasks,
            inner_rate=INNER_RATE, stages=self._stages(),
        )  # fmt: skip

    def step(self, prompt: Tensor) -> Tensor:
        """The outer gradient [P, D]."""
        params = as_leaf(prompt)
        total, figures = self.losses(params, self.support, self.query)
        total.backward()
        Outcome.of(figures)  # as training reads it
        gradient = params["prompt_embeddings"].grad
        assert gradient is not None
        return gradient


class Loop:
    """The other side: one task after another through Hugging Face's forward."""

    def __init__(self, model: T5ForConditionalGeneration, mode: str, setting: Setting):
        self.model, self.mode, self.setting = model, mode, setting
        rows, labels = make_rows(setting, model.config.vocab_size)
        half, count = len(rows) // 2, setting.samples
        self.tasks = [
            (part(rows, labels, t * count, count), part(rows, labels, half + t * count, count))
            for t in range(setting.tasks)
        ]
        self.words, self.decoder_ids = torch.tensor(WORDS), torch.tensor(DECODER_IDS)

    def to(self, device: str) -> Loop:
        self.tasks = [(s.to(device), q.to(device)) for s, q in self.tasks]
        self.words, self.decoder_ids = self.words.to(device), self.decoder_ids.to(device)
        return self

    def _mask(self, batch: Batch, prompt_tokens: int, dtype: torch.dtype) -> Tensor:
        """[M, P+S], or for `prefix` additive [M, 1, P+S, P+S]: the prompt sees itself only."""
        ones = torch.ones(len(batch.ids), prompt_tokens, dtype=torch.bool, device=batch.ids.device)
        keys = torch.cat((ones, batch.mask), dim=1)
        if self.mode == "full":
            return keys.long()
        length = keys.shape[1]
        allowed = keys[:, None, None, :].expand(-1, 1, length, -1).clone()
        allowed[:, :, :prompt_tokens, prompt_tokens:] = False
        return torch.zeros(allowed.shape, dtype=dtype, device=keys.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def loss(self, prompt: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of a task's rows under one prompt [P, D]."""
        rows, count = batch.ids.shape[0], prompt.shape[0]
        prompt = prompt.to(self.model.dtype)
        text = self.model.shared(batch.ids)
        embedded = torch.cat((prompt[None].expand(rows, -1, -1), text), dim=1)
        keys = torch.cat((torch.ones_like(batch.ids[:, :1]).expand(-1, count), batch.mask), dim=1)
        states = self.model.encoder(
            inputs_embeds=embedded, attention_mask=self._mask(batch, count, prompt.dtype)
        )
        logits = self.model(
            encoder_outputs=states,
            attention_mask=keys,
            decoder_input_ids=self.decoder_ids[None].expand(rows, -1),
            use_cache=False,
        ).logits
        assert batch.labels is not None
        scores = widened(logits[:, -1, self.words])
        return torch.nn.functional.cross_entropy(scores, batch.labels)

    def step(self, prompt: Tensor) -> Tensor:
        """The outer gradient [P, D]."""
        leaf = prompt.detach().clone().requires_grad_()
        for support, query in self.tasks:
            clone = leaf.clone()
            (gradient,) = torch.autograd.grad(self.loss(clone, support), clone, create_graph=True)
            adapted = clone - INNER_RATE * gradient
            self.loss(adapted, query).backward()
        assert leaf.grad is not None
        return leaf.grad


def make_prompt(model: T5ForConditionalGeneration, tokens: int) -> Tensor:
    """A prompt [P, D] from the vocabulary, in fp32 at least."""
    weight = model.shared.weight
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(100, weight.shape[0], (tokens,), generator=generator)
    return widened(weight.detach()[chosen.to(weight.device)].clone())


def as_leaf(prompt: Tensor) -> Params:
    """A copy of a prompt, to be trained."""
    return {"prompt_embeddings": prompt.detach().clone().requires_grad_()}


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    return float((first.double() - second.double()).norm() / second.double().norm())


def _norm(layer: T5LayerNorm, hidden: Tensor) -> Tensor:
    """T5's norm in the precision that it is given."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    return layer.weight * (hidden * scale)


def parity(name: str, mode: str, setting: Setting, device: str = "cpu") -> dict[str, float]:
    """Relative differences of the gradients, over a few tasks.

    transformers' norm takes its mean of squares in float32 whatever it is given, so float64 would
    be compared with float32; for this check alone it is float64 throughout.

    Returns:
        float64, float32: our gradient against the loop's; rounding: the loop's float32 gradient
        against its own float64 one, which is what float32 leaves of it.
    """
    setting = replace(setting, tasks=min(PARITY_TASKS, setting.tasks))
    found: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        model = make_model(name, dtype, device)
        prompt = make_prompt(model, setting.prompt_tokens)
        with mock.patch.object(T5LayerNorm, "forward", _norm):
            ours = Batched(model, mode, setting).to(device)
            loop = Loop(model, mode, setting).to(device)
            found[dtype] = ours.step(prompt), loop.step(prompt)
    return {
        "float64": relative_difference(*found[torch.float64]),
        "float32": relative_difference(*found[torch.float32]),
        "rounding": relative_difference(found[torch.float32][1], found[torch.float64][1]),
    }


def equal(found: dict[str, float]) -> bool:
    """Whether the gradients are the same but for rounding."""
    return found["float64"] < 1e-6 and found["float32"] < max(1e-6, 10 * found["rounding"])


def time_in_turn(
    sides: dict[str, Callable[[], Any]], repeats: int, wait: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and CPU seconds over all threads, of each side.

    The sides take turns, so that a busy moment of the machine meets all of them; the CPU seconds
    say what each would take on a machine that does nothing else.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            wait()
            started, spent = time.perf_counter(), time.process_time()
            side()
            wait()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - spent)
    return seconds, cpu


def operations(side: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of a step; runs it once."""
    with FlopCounterMode(display=False) as counter:
        side()
    return counter.get_total_flops()


def measure(name: str, mode: str, setting: Setting, repeats: int, device: str) -> dict[str, Any]:
    """Median seconds of both sides in float32."""
    model = make_model(name, torch.float32, device)
    prompt = make_prompt(model, setting.prompt_tokens)
    batched = Batched(model, mode, setting).to(device)
    loop = Loop(model, mode, setting).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sides = {"loop": lambda: loop.step(prompt), "batched": lambda: batched.step(prompt)}
    work = {name: operations(side) for name, side in sides.items()}  # and allocates once
    seconds, cpu = time_in_turn(sides, repeats, wait)
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["batched"], strict=True)]
    middle = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds, "all_cpu_seconds": cpu,
        "speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)],
        "cpu_speedup": middle["loop"] / middle["batched"],
        "operations": work, "fewer_operations": work["loop"] / work["batched"],
    }  # fmt: skip


def as_table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| geometry | mode | loop, s | batched, s | times faster | range | by CPU time | "
        "by operations | gradient difference, float64 | float32 | float32's own rounding |",
        "|" + "---|" * 11,
    ]
    for row in results:
        low, high = row["speedup_range"]
        lines.append(
            f"| {row['geometry']} | {row['mode']} | {row['seconds']['loop']:.3f} | "
            f"{row['seconds']['batched']:.3f} | {row['speedup']:.2f} | {low:.2f} … {high:.2f} | "
            f"{row['cpu_speedup']:.2f} | {row['fewer_operations']:.2f} | "
            + (" | ".join(f"{row['parity'][key]:.1e}" for key in CHECKS) if row["parity"] else "||")
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--geometry", nargs="+", default=["small", "mini"])
    parser.add_argument("--modes", nargs="+", default=["full", "prefix"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-parity", action="store_true", help="skip the check (profiling only)")
    parser.add_argument("--out", default="runs/meta_training", help="writes OUT.json and OUT.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given.tasks, given.samples, given.prompt_tokens)
    results = []
    for name in given.geometry:
        for mode in given.modes:
            check = None if given.no_parity else parity(name, mode, setting, given.device)
            if check is not None and not equal(check):
                raise SystemExit(f"{name} {mode}: gradients differ by {check}")
            result = measure(name, mode, setting, given.repeats, given.device)
            results.append({"geometry": name, "mode": mode, "parity": check, **result})
            print(as_table(results[-1:]).splitlines()[-1], flush=True)
    out = Path(given.out)
    settings = {**vars(given), "torch": torch.__version__}
    write_json(out.with_suffix(".json"), {"settings": settings, "results": results})
    table = as_table(results)
    with atomic_write(out.with_suffix(".md")) as temporary:
        temporary.write_text(table)
    print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
