"""A sentence encoder compiled to ONNX: run by onnxruntime, without torch and without its folder.

On a CPU it is about twice as fast as torch (docs/speed.md), and a cluster's workers neither load
torch nor need the model: the whole encoder travels to them as one object.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import Failure, UserError, install
from serve.files import atomic_folder, sha256
from trainer.cache import cache_folder
from trainer.embed import encoder_digest, load_encoder

logger = logging.getLogger(__name__)

ENGINES = ("auto", "onnx", "torch")
BATCH_TOKENS = 512  # padding included: see benchmarks.sentence_encoder
_FORMAT = 1  # of what is kept in the cache
_ANY = 2**31 - 1  # tokens, where a tokenizer names no bound (1e30)
_TOLERANCE = 1e-5  # of a unit vector's numbers against torch's; 3e-7 was found
_PROBES = (
    "I loved it.", "no", "", "The plot makes no sense at all, and the actors know it. " * 40,
    "Das Café 数字 😀 – naïve?", "one two three four five six seven eight",
)  # fmt: skip


@dataclass
class OnnxEncoder:
    """Texts to unit vectors. It can be sent to another process, which opens its own session.

    Attributes:
        model: the graph: ids, mask [B, S] -> vectors [B, D], of length 1.
        tokenizer: the text of a `tokenizer.json`.
        longest: tokens of a text, after which it is cut.
        pad: the id that fills shorter rows of a batch.
        threads: of a session; 0 takes the machine's cores, and a copy in another process has 1.
    """

    model: bytes
    tokenizer: str
    longest: int
    pad: int
    threads: int = 0
    _opened: tuple[Any, Any] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Sent where many work side by side: an actor has one core.
        return {**vars(self), "_opened": None, "threads": 1}

    def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """[N, D] float32, rows of length 1; takes what SentenceTransformer.encode takes."""
        if self._opened is None:
            self._opened = self._open()
        session, tokenizer = self._opened
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        parts: list[np.ndarray] = []
        start = 0
        while start < len(order):
            width = max(1, len(rows[order[start]]))
            chosen = order[start : start + max(1, BATCH_TOKENS // width)]
            ids = np.full((len(chosen), width), self.pad, np.int64)
            mask = np.zeros_like(ids)
            for place, row in enumerate(chosen):
                ids[place, : len(rows[row])] = rows[row]
                mask[place, : len(rows[row])] = 1
            parts.append(session.run(None, {"ids": ids, "mask": mask})[0])
            start += len(chosen)
        if not parts:
            return np.empty((0, 0), np.float32)
        vectors = np.concatenate(parts)
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

    def _open(self) -> tuple[Any, Any]:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            self.model, options, providers=["CPUExecutionProvider"]
        )
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.longest)
        return session, tokenizer


def choose_encoder(source: str, engine: str, otherwise: str = "torch") -> OnnxEncoder | str:
    """What `--engine` asks for: the compiled encoder, or its source for torch.

    Args:
        source: see `trainer.embed.encoder_source`.
        engine: one of ENGINES; "auto" is `otherwise`, and torch where that cannot be had.
        otherwise: "onnx" or "torch".

    Raises:
        UserError: "onnx" is asked for by name, and a package is missing or the encoder is of a
            kind that is not compiled. Failure: see `load_encoder`, or the graph differs from torch.
    """
    if "torch" in (engine, otherwise if engine == "auto" else engine):
        return source
    try:
        return compile_encoder(source)
    except (UserError, Failure) as error:
        if engine == "onnx":
            raise
        logger.info("the encoder runs in torch (%s)", error)
        return source


def compile_encoder(source: str) -> OnnxEncoder:
    """The encoder of a folder or hub id as ONNX; made once, and then taken from the cache.

    Raises:
        UserError, Failure: see `choose_encoder`.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError(f"--engine onnx needs onnx and onnxscript: {install('exporter')}")
    folder = cache_folder() / "encoders" / f"{encoder_digest(source)[:32]}-{_FORMAT}"
    if found := _read(folder):
        return found
    encoder = _compile(source)
    with atomic_folder(folder) as made:
        (made / "encoder.onnx").write_bytes(encoder.model)
        (made / "tokenizer.json").write_text(encoder.tokenizer, "utf-8")
        facts = {
            "longest": encoder.longest, "pad": encoder.pad,
            **{name: sha256(made / name) for name in ("encoder.onnx", "tokenizer.json")},
        }  # fmt: skip
        (made / "encoder.json").write_text(json.dumps(facts) + "\n", "utf-8")
    return encoder


def _read(folder: Path) -> OnnxEncoder | None:
    """What was compiled before; None if nothing was, or it is damaged."""
    try:
        facts = json.loads((folder / "encoder.json").read_bytes())
        if any(sha256(folder / name) != facts[name] for name in ("encoder.onnx", "tokenizer.json")):
            return None
        model = (folder / "encoder.onnx").read_bytes()
        tokenizer = (folder / "tokenizer.json").read_text("utf-8")
        return OnnxEncoder(model, tokenizer, facts["longest"], facts["pad"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compile(source: str) -> OnnxEncoder:
    import torch
    from torch.export import Dim

    from exporter.trace import to_onnx

    model = load_encoder(source).cpu()
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    if tokenizer is None or any((model.prompts or {}).values()):
        raise UserError(
            f"--encoder {source} has a tokenizer or prompts that only torch runs: pass "
            "--engine torch"
        )

    class Whole(torch.nn.Module):
        """From ids to unit vectors, pooling and whatever else the encoder is made of included."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found = self.model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
            return torch.nn.functional.normalize(found, dim=-1)

    logger.info("compiling the sentence encoder, once")
    ids = torch.arange(42).view(6, 7) % len(model.tokenizer)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    axes = {0: Dim("B"), 1: Dim("S")}
    graph = to_onnx(Whole(), (ids, mask), ["ids", "mask"], ["vectors"], (axes, axes))
    encoder = OnnxEncoder(
        graph.SerializeToString(), tokenizer.to_str(),
        min(int(model.max_seq_length or _ANY), _ANY), int(model.tokenizer.pad_token_id or 0),
    )  # fmt: skip
    expected = model.encode(list(_PROBES), normalize_embeddings=True, show_progress_bar=False)
    difference = float(np.abs(encoder.encode(_PROBES) - expected).max())
    if not difference < _TOLERANCE:
        raise Failure(
            f"--encoder {source}: onnxruntime's vectors differ from torch's by {difference:.1e}: "
            "pass --engine torch"
        )
    return encoder
