"""The text bench: perplexity, KL and top-1 agreement of many variants on the same windows of several texts.

The protocol is that of `evaluate_text`: whole windows, no overlap, no BOS, the first token of a window is not scored. What the
unmodified model says is computed once: its log-probabilities are kept per window (`logits.BaseLogits`) and read again for
every variant, in this process and in later ones. The main figures of several texts are their geometric mean perplexity and
the KL over all tokens.

Legend: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.errors import CalibrationError, SpecError
from trimtab.measure.base_logits import BaseLogits, BaseWindow
from trimtab.measure.quality import ROWS, Quality, TokenScores, kl_divergence, standard_error, windows
from trimtab.model.variant import Model, Variant
from trimtab.runtime.engine.generate import Runner, check_context
from trimtab.runtime.engine.generator import Generator
from trimtab.runtime.step import IntArray, Step
from trimtab.runtime.weights.packed import fingerprint

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

#: Token ids [T] -> logits [T, V] (or [T - 1, V]: the last row is not scored), as a tensor or a numpy array.
Logits = Callable[[IntArray], Any]
Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Quality of one variant on every text of a bench.

    Args:
        label: what was scored.
        texts: quality by name of the text.
        scores: the single tokens behind it, in the order of the text: what `paired` compares.
    """

    label: str
    texts: dict[str, Quality]
    scores: dict[str, TokenScores]

    @property
    def tokens(self) -> int:
        """Tokens scored, all texts."""
        return sum(quality.tokens for quality in self.texts.values())

    @property
    def ppl(self) -> float:
        """Geometric mean over texts of the perplexity."""
        return _geometric_mean([quality.ppl for quality in self.texts.values()])

    @property
    def ppl_base(self) -> float:
        """The same of the unmodified model."""
        return _geometric_mean([quality.ppl_base for quality in self.texts.values()])

    @property
    def nll_difference(self) -> float:
        """ln(`ppl` / `ppl_base`) in nats: the mean over texts of their paired differences."""
        return float(np.mean([quality.nll_difference for quality in self.texts.values()]))

    @property
    def nll_difference_se(self) -> float:
        """Its standard error: texts are independent and weigh the same."""
        errors = [quality.nll_difference_se for quality in self.texts.values()]
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)

    @property
    def kl_nats(self) -> float:
        """Mean KL(base || variant) in nats over all tokens of all texts."""
        return self._over_tokens("kl_nats")

    @property
    def kl_se(self) -> float:
        """Its standard error, texts as strata."""
        return self._error_over_tokens("kl_se")

    @property
    def top1_agreement(self) -> float:
        """Share of all tokens at which both would choose the same one."""
        return self._over_tokens("top1_agreement")

    @property
    def top1_se(self) -> float:
        """Its standard error, texts as strata."""
        return self._error_over_tokens("top1_se")

    def _over_tokens(self, name: str) -> float:
        return sum(getattr(quality, name) * quality.tokens for quality in self.texts.values()) / self.tokens

    def _error_over_tokens(self, name: str) -> float:
        return (
            math.sqrt(sum((getattr(quality, name) * quality.tokens) ** 2 for quality in self.texts.values()))
            / self.tokens
        )

    def quality(self) -> Quality:
        """All texts as one: geometric mean perplexity, KL and agreement over all tokens."""
        return Quality(
            tokens=self.tokens,
            ppl=self.ppl,
            ppl_base=self.ppl_base,
            nll_difference=self.nll_difference,
            nll_difference_se=self.nll_difference_se,
            kl_nats=self.kl_nats,
            kl_se=self.kl_se,
            top1_agreement=self.top1_agreement,
            top1_se=self.top1_se,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the figures of all texts as one, and those of each under ``texts``."""
        return asdict(self.quality()) | {"texts": {name: asdict(quality) for name, quality in self.texts.items()}}


class TextBench:
    """Texts cut into windows, and what an unmodified model says to them.

    Args:
        base: the unmodified model: `Model`, `Variant`, or with `key` anything `score` takes.
        texts: by name: a text, or token ids.
        window: tokens of a window.
        windows: most windows of a text, spread evenly over it; None = all.
        tokenizer: for a base without one.
        key: names a base that is no model, for the cache.
        logits: keeps the base's log-probabilities; by default on disk under `home()`. ``BaseLogits(folder=None)`` keeps
            them in memory.
        progress: wraps windows and shows a bar, ``progress(label, items)``.

    Raises:
        CalibrationError: no text, or one shorter than a window.
        SpecError: no window, one longer than the context, a text without a tokenizer, a base without a key.
    """

    def __init__(
        self,
        base: Model | Variant | Runner | Logits,
        texts: Mapping[str, str | Sequence[int] | IntArray],
        *,
        window: int = 1024,
        windows: int | None = None,
        tokenizer: Tokenizer | None = None,
        key: str | None = None,
        logits: BaseLogits | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not texts:
            raise CalibrationError("No text is given. Name at least one.")
        if window < 2:
            raise SpecError(f"A window of {window} tokens has nothing to score. Allowed: 2 or more. Try 1024.")
        if windows is not None and windows < 1:
            raise SpecError(f"windows={windows} is not possible. Allowed: 1 or more. Try 3.")
        variant = base.variant if isinstance(base, Model) else base
        if isinstance(variant, Variant):
            check_context(variant.spec, window, 0)
            key = key or f"{fingerprint(variant.weights)} {variant.spec.hash}"
        if key is None:
            raise SpecError("A base that is no model needs a name for its logits. Pass key=...")
        if isinstance(base, Generator) and tokenizer is None and any(isinstance(text, str) for text in texts.values()):
            tokenizer = base.tokenizer
        self.windows = {name: _cut(name, text, tokenizer, window, windows) for name, text in texts.items()}
        self.logits = logits if logits is not None else BaseLogits()
        self._forward, self._key = logits_of(variant), key
        self._progress = progress or (lambda _, items: iter(items))

    @property
    def tokens(self) -> int:
        """Tokens scored, all texts."""
        return sum(len(piece) - 1 for pieces in self.windows.values() for piece in pieces)

    def prepare(self) -> None:
        """Compute what the base says to every window now, so that the model may be freed or timed alone."""
        pieces = [piece for pieces in self.windows.values() for piece in pieces]
        for piece in self._progress("unmodified", pieces):
            self._base(piece)

    def score(self, variant: Model | Variant | Generator | Runner | Logits, label: str = "") -> BenchResult:
        """Score a variant on every window.

        Args:
            variant: a `Model` (as it is now) or `Variant`, run by the torch decoder without a cache; a native model or any
                other `Runner`, which reads each window in one pass through its own cache; or a function of token ids [T]
                that returns logits.
            label: of the result and the bar.
        """
        forward = logits_of(variant)
        every = [(name, piece) for name, pieces in self.windows.items() for piece in pieces]
        scores = {name: TokenScores() for name in self.windows}
        for name, piece in self._progress(label or "windows", every):
            _add(scores[name], self._base(piece), _tensor(forward(piece), piece), piece)
        return BenchResult(label=label, texts={name: found.result() for name, found in scores.items()}, scores=scores)

    def _base(self, piece: IntArray) -> BaseWindow:
        key = hashlib.sha256(f"{self._key} {len(piece)} ".encode() + piece.tobytes()).hexdigest()
        return self.logits.get(key, lambda: (_tensor(self._forward(piece), piece), piece[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredShare:
    """How much of what a naive method loses another one keeps: 1 = as good as the unmodified model, 0 = as bad as the naive one.

    Args:
        texts: by name of the text.
        geometric_mean: of the geometric mean perplexity.
    """

    texts: dict[str, float]
    geometric_mean: float


def recovered_share(method: BenchResult, naive: BenchResult) -> RecoveredShare:
    """``1 - (ln ppl_method - ln ppl_base) / (ln ppl_naive - ln ppl_base)``, per text and on the geometric mean.

    Raises:
        SpecError: results on different tokens, or a naive method that loses nothing.
    """
    _same_tokens(method, naive)
    shares = {
        name: _recovered(quality.nll_difference, naive.texts[name].nll_difference, name)
        for name, quality in method.texts.items()
    }
    return RecoveredShare(
        texts=shares,
        geometric_mean=_recovered(method.nll_difference, naive.nll_difference, "the geometric mean"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One variant less another on the same tokens; every mean is over all tokens, with its standard error.

    Args:
        nll_nats, nll_se: negative log-likelihood.
        kl_nats, kl_se: KL to the unmodified model.
    """

    nll_nats: float
    nll_se: float
    kl_nats: float
    kl_se: float


def paired(method: BenchResult, other: BenchResult) -> Difference:
    """`method` less `other`, token by token: negative where `method` is better.

    Raises:
        SpecError: results on different tokens.
    """
    _same_tokens(method, other)

    def differences(name: str) -> np.ndarray:
        ours, theirs = (
            np.concatenate([getattr(result.scores[text], name) for text in method.texts]) for result in (method, other)
        )
        return ours - theirs

    nll, kl = differences("nll"), differences("kl")
    return Difference(
        nll_nats=float(nll.mean()),
        nll_se=standard_error(nll),
        kl_nats=float(kl.mean()),
        kl_se=standard_error(kl),
    )


def logits_of(what: Model | Variant | Generator | Runner | Logits) -> Logits:
    """How `what` turns the ids of a window [T] into logits [T - 1, V] of all tokens but the last.

    Raises:
        SpecError: it is nothing that can be scored.
    """
    if isinstance(what, Model):
        what = what.variant
    if isinstance(what, Variant):
        return lambda piece: _decoded(what, piece)
    runner = what.runner() if isinstance(what, Generator) else what
    if hasattr(runner, "open_store") and hasattr(runner, "forward"):
        return lambda piece: _run(runner, piece)  # type: ignore[arg-type]
    if not callable(what):
        raise SpecError(
            f"A {type(what).__name__} cannot be scored. Pass a model, a variant, or a function ids -> logits."
        )
    return what


def _decoded(variant: Variant, piece: IntArray) -> torch.Tensor:
    wanted = np.arange(len(piece) - 1, dtype=np.int64)
    return variant.decoder(torch.from_numpy(piece), Step.of([len(piece)], [0]), None, wanted)


def _run(runner: Runner, piece: IntArray) -> np.ndarray:
    """The window in one pass through a cache of its own."""
    check_context(runner.spec, len(piece), 0)
    store = runner.open_store()
    seq = store.open(reserve_tokens=len(piece))
    try:
        wanted = np.arange(len(piece) - 1, dtype=np.int64)
        return runner.forward(piece, Step.of([len(piece)], [0], [seq]), store, wanted)
    finally:
        store.free(seq)


def _tensor(logits: Any, piece: IntArray) -> torch.Tensor:
    """Logits of all tokens but the last.

    Raises:
        SpecError: they are not one row for each token.
    """
    found = logits if isinstance(logits, torch.Tensor) else torch.from_numpy(np.asarray(logits))
    if found.ndim != 2 or len(found) not in (len(piece) - 1, len(piece)):
        raise SpecError(
            f"Logits of shape {list(found.shape)} do not fit a window of {len(piece)} tokens. "
            f"Return [{len(piece)}, vocabulary]."
        )
    return found[: len(piece) - 1]


def _add(scores: TokenScores, base: BaseWindow, variant_TV: torch.Tensor, piece: IntArray) -> None:
    """Score one window, by blocks of rows."""
    if variant_TV.shape[1] != base.log_probs.shape[1]:
        raise SpecError(
            f"The variant has {variant_TV.shape[1]} tokens in its vocabulary, the unmodified model "
            f"{base.log_probs.shape[1]}: their distributions cannot be compared."
        )
    next_T = torch.from_numpy(piece[1:])
    for start in range(0, len(next_T), ROWS):
        rows = slice(start, start + ROWS)
        q = variant_TV[rows].float().log_softmax(-1)
        scores.nll += (-q.gather(-1, next_T[rows, None])[:, 0]).tolist()
        scores.kl += kl_divergence(base.rows(rows), q).tolist()
        scores.agree += (q.argmax(-1).numpy() == base.top[rows]).astype(float).tolist()
    scores.nll_base += base.nll.tolist()


def _cut(
    name: str, text: str | Sequence[int] | IntArray, tokenizer: Tokenizer | None, window: int, most: int | None
) -> list[IntArray]:
    if isinstance(text, str):
        if tokenizer is None:
            raise SpecError(f"Text '{name}' needs a tokenizer and the model has none. Pass token ids.")
        text = tokenizer.encode(text)
    try:
        return windows(text, window, most)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from None


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _recovered(method: float, naive: float, name: str) -> float:
    if naive <= 0:
        raise SpecError(
            f"The naive method loses nothing on {name} ({naive:+.4f} nats): there is no gap to recover. "
            "Compare with a coarser one."
        )
    return 1 - method / naive


def _same_tokens(one: BenchResult, other: BenchResult) -> None:
    found = [{name: (quality.tokens, quality.ppl_base) for name, quality in r.texts.items()} for r in (one, other)]
    if found[0] != found[1]:
        raise SpecError(
            f"'{one.label}' and '{other.label}' were not scored on the same tokens of the same model. "
            "Score both with one TextBench."
        )
