"""Idealized runtime of a model: what a request costs on a stack of its own, as two quantities fitted to a few timings.

    T(p, o) = F(p) + (o - 1) g + h

F(p) is the time to encode p prompt tokens and emit the first token, g the time of every further token, h what a request
costs however short it is (known only of a service). The model is whatever can be asked for (prompt tokens, output tokens)
and timed, so engines, services and predictions are fitted by the same lines. Source: Narayanan et al., arXiv 2305.02440,
section 3, and the rule between profiled prompts of HELM (`efficiency_metrics.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import CalibrationError, SpecError

Statistic = Literal["mean", "median", "min"]
Interp = Literal["linear", "helm", "affine"]
FloatArray = npt.NDArray[np.float64]

INTERPS: tuple[Interp, ...] = ("linear", "helm", "affine")
STATISTICS: Mapping[str, Callable[[FloatArray], Any]] = {"mean": np.mean, "median": np.median, "min": np.min}

#: A fall of F that is worth a warning: beyond this many standard deviations of the noise, and beyond this share of F.
_FALL_SIGMAS, _FALL_SHARE = 2.0, 0.02
#: Longest prompt that is one pass over hardly more than one token, as a decode step is: what it takes beyond g is overhead.
_SHORT_PROMPT = 1


class Sample(NamedTuple):
    """One timed request."""

    prompt_tokens: int
    output_tokens: int
    seconds: float


class Residual(NamedTuple):
    """How far one profiled point is from the fit: measured minus fitted."""

    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which (prompt, output) pairs are timed, and how often.

    Args:
        prompts: prompt tokens, ascending.
        outputs: output tokens, ascending, at least three of them: two always lie on a line.
        trials: repetitions of every pair.

    Raises:
        SpecError: not sorted, not unique, a number below 1, or fewer than three outputs.
    """

    prompts: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 384, 512, 768, 1024)
    outputs: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    trials: int = 3

    def __post_init__(self) -> None:
        for name, values in (("prompts", self.prompts), ("outputs", self.outputs)):
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise SpecError(
                    f"{name}={_joined(values)} is not a grid. Allowed: ascending whole numbers of 1 or more, each once, "
                    "for example 1+16+64."
                )
        if len(self.outputs) < 3:
            raise SpecError(
                f"outputs={_joined(self.outputs)} holds {len(self.outputs)} points and cannot separate F from g with a check. "
                "Allowed: 3 or more. Try outputs=1+8+32."
            )
        if self.trials < 1:
            raise SpecError(f"trials={self.trials} is not possible. Allowed: 1 or more. Try trials=3.")

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Every (prompt, output) pair."""
        return tuple((p, o) for p in self.prompts for o in self.outputs)

    def least(self) -> Grid:
        """Nine runs that reach as far: the shortest, the middle and the longest prompt, three outputs, once each.

        >>> Grid(prompts=(1, 128, 512, 1024), outputs=(1, 16, 64)).least().points[-1]
        (1024, 64)
        """
        longest, most = self.prompts[-1], self.outputs[-1]
        prompts = tuple(sorted({1, max(longest // 2, 1), longest}))
        return Grid(prompts=prompts, outputs=(1, max(most // 4, 2), most), trials=1)

    def up_to(self, tokens: int) -> Grid:
        """Only prompts that leave room for the longest output in a context of `tokens`.

        Raises:
            SpecError: none does.
        """
        kept = tuple(p for p in self.prompts if p + self.outputs[-1] <= tokens)
        if not kept:
            raise SpecError(
                f"No prompt of {_joined(self.prompts)} with {self.outputs[-1]} output tokens fits a context of {tokens}. "
                "Give shorter ones with --prompts and --outputs."
            )
        return Grid(prompts=kept, outputs=self.outputs, trials=self.trials)


def parse_points(text: str) -> tuple[int, ...]:
    """Read ``1+16+64`` (or with ``|`` or commas).

    Raises:
        SpecError: something in it is not a whole number.
    """
    parts = text.replace("|", "+").replace(",", "+").split("+")
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise SpecError(f"'{text}' is not a list of token counts. Write whole numbers like 1+16+64.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The fitted time of a request.

    Args:
        prompt_tokens, prompt_s: F at the profiled prompts, ascending.
        token_s: g; None when nothing beyond the first token was timed.
        overhead_s: h.
        r_squared: of the one regression for g over all prompts; None for a runtime that was not fitted.
        intercept_s: of that regression, what the first decode step has over the others; not part of the model.
        largest_residual: the profiled point farthest from the model.
        warnings: sentences for the reader.
    """

    prompt_tokens: tuple[int, ...]
    prompt_s: tuple[float, ...]
    token_s: float | None
    overhead_s: float = 0.0
    r_squared: float | None = None
    intercept_s: float = 0.0
    largest_residual: Residual | None = None
    warnings: tuple[str, ...] = ()

    def prompt_time_s(self, prompt_tokens: npt.ArrayLike, interp: Interp = "linear") -> Any:
        """F of any prompt, in seconds.

        Args:
            prompt_tokens: one count or an array of them, 1 or more.
            interp: ``linear`` between profiled prompts, constant below the first, along the last segment above the last;
                ``helm`` scales the time of the next longer profiled prompt by p / that prompt (above the last: of the last),
                which under-predicts where F is flat; ``affine`` max(F(first), a + b p) through the other prompts, for
                profiles of few points: falls back to linear where a would be negative, since no prompt costs less than none.

        Raises:
            SpecError: a prompt below 1 or an unknown rule.
        """
        wanted = np.asarray(prompt_tokens, dtype=np.float64)
        if wanted.size and wanted.min() < 1:
            raise SpecError(f"prompt_tokens={wanted.min():g} is not possible. Allowed: 1 or more.")
        if interp not in INTERPS:
            raise SpecError(f"interp={interp} is not known. Allowed: {', '.join(INTERPS)}.")
        keys, times = np.array(self.prompt_tokens, dtype=np.float64), np.array(self.prompt_s)
        if interp == "helm":
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found = times[at] * wanted / keys[at]
        else:
            line = _upper_line(keys, times) if interp == "affine" else None
            found = _linear(keys, times, wanted) if line is None else np.maximum(times[0], line[0] + line[1] * wanted)
        return found if found.ndim else float(found)

    def time_s(self, prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike, interp: Interp = "linear") -> Any:
        """T(p, o) in seconds; no output token costs as much as one, for the prompt is encoded all the same.

        Args:
            prompt_tokens, output_tokens: counts or arrays that broadcast.
            interp: see `prompt_time_s`.

        Raises:
            SpecError: a negative output, or more than one token where g is not known.
        """
        outputs = np.asarray(output_tokens, dtype=np.float64)
        if outputs.size and outputs.min() < 0:
            raise SpecError(f"output_tokens={outputs.min():g} is not possible. Allowed: 0 or more.")
        steps = np.maximum(outputs - 1, 0)
        if self.token_s is None and steps.any():
            raise SpecError("Only F was timed (no output token), g is unknown. Time requests of two or more lengths.")
        found = self.prompt_time_s(prompt_tokens, interp) + self.overhead_s + steps * (self.token_s or 0.0)
        return found if np.ndim(found) else float(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        worst = self.largest_residual
        return {
            "prompt_s": {str(p): t for p, t in zip(self.prompt_tokens, self.prompt_s, strict=True)},
            "token_s": self.token_s,
            "overhead_s": self.overhead_s,
            "r_squared": self.r_squared,
            "intercept_s": self.intercept_s,
            "largest_residual": worst._asdict() if worst else None,
            "warnings": list(self.warnings),
        }


def fit_runtime(samples: Iterable[Sample | tuple[int, int, float]], statistic: Statistic = "mean") -> Runtime:
    """Fit F and g: F is the time at one output token, g the slope of one regression of what is left over all prompts.

    Args:
        samples: timed requests; repeated pairs are trials. A request of no output token counts as one of one token.
        statistic: what stands for the trials of a pair: their ``mean`` (the paper), ``median`` or ``min``.

    Raises:
        SpecError: a count or a time that cannot be.
        CalibrationError: no sample, or a single output length, which cannot separate F from g.
    """
    rows = [_checked(sample) for sample in samples]
    if not rows:
        raise CalibrationError("No timed request was given. Give lines of prompt_tokens, output_tokens and seconds.")
    if statistic not in STATISTICS:
        raise SpecError(f"statistic={statistic} is not known. Allowed: {', '.join(STATISTICS)}.")
    p, steps, seconds, spread = _aggregate(rows, STATISTICS[statistic])
    prompts = np.unique(p)
    if max(row.output_tokens for row in rows) == 0:
        return Runtime(prompt_tokens=_ints(prompts), prompt_s=tuple(seconds.tolist()), token_s=None)

    # Each prompt is referred to its own time at one output token; where that was not timed, to the mean of its points.
    reference = np.array([_reference(steps[p == each], seconds[p == each]) for each in prompts])
    at = np.searchsorted(prompts, p)
    x, y = steps - reference[at, 0], seconds - reference[at, 1]
    if np.ptp(x) == 0:
        lengths = _joined(sorted({row.output_tokens for row in rows}))
        raise CalibrationError(
            f"Every prompt was timed at a single output length ({lengths}): that cannot separate F from g. "
            "Time the same prompt at two lengths or more, for example 1 and 32."
        )
    slope, intercept = np.polyfit(x, y, 1)
    residuals = y - (slope * x + intercept)
    total = float(((y - y.mean()) ** 2).sum())
    found = reference[:, 1] - slope * reference[:, 0]
    off = seconds - (found[at] + slope * steps)
    worst = int(np.argmax(np.abs(off)))
    noise = max(float(np.sqrt(np.mean(residuals**2))), float(np.median(spread)))
    return Runtime(
        prompt_tokens=_ints(prompts),
        prompt_s=tuple(found.tolist()),
        token_s=float(slope),
        r_squared=1.0 - float((residuals**2).sum()) / total if total else 1.0,
        intercept_s=float(intercept),
        largest_residual=Residual(int(p[worst]), int(steps[worst]) + 1, float(off[worst])),
        warnings=_falls(prompts, found, noise),
    )


def denoise(samples: Iterable[Sample | tuple[int, int, float]], overhead_s: float | None = None) -> Runtime:
    """Fit what a service would take without contention: every pair stands for the fastest of its trials.

    Contention only adds, so the minimum forgets it and the mean does not. The overhead h of a request (network, queue,
    tokenizing) is what a prompt of one token takes beyond g: encoding one token is one pass over one token, as a decode step
    is. Without such a prompt h cannot be told from F and stays in it.

    Args:
        samples: timed requests, several trials of each pair.
        overhead_s: h if it is known (the time of an empty request, for example).

    Raises:
        SpecError: h below 0 or beyond the fastest request.
        CalibrationError: see `fit_runtime`.
    """
    from dataclasses import replace

    rows = [_checked(sample) for sample in samples]
    fitted = fit_runtime(rows, "min")
    warnings = list(fitted.warnings)
    if overhead_s is None:
        if fitted.token_s is not None and fitted.prompt_tokens[0] <= _SHORT_PROMPT:
            overhead_s = max(fitted.prompt_s[0] - fitted.token_s, 0.0)
        else:
            overhead_s = 0.0
            warnings.append(
                "No prompt of one token was timed: the overhead of a request cannot be told from F and is in it."
            )
    if not 0 <= overhead_s < min(fitted.prompt_s):
        raise SpecError(
            f"overhead_s={overhead_s:g} is not possible: the fastest request takes {min(fitted.prompt_s):.4g} s. "
            "Allowed: 0 up to that."
        )
    fewest = min(_trials(rows).values())
    if fewest < 3:
        warnings.append(
            f"Some pairs have {fewest} trial{'s' * (fewest > 1)}: too few for a minimum free of contention."
        )
    encoded = tuple(t - overhead_s for t in fitted.prompt_s)
    return replace(fitted, prompt_s=encoded, overhead_s=overhead_s, warnings=tuple(warnings))


def discrepancy(samples: Iterable[Sample], runtime: Runtime, interp: Interp = "linear") -> FloatArray:
    """Observed minus idealized seconds of each request: queueing, contention and slower hardware, or faster if negative."""
    rows = list(samples)
    times = runtime.time_s([row.prompt_tokens for row in rows], [row.output_tokens for row in rows], interp)
    return np.array([row.seconds for row in rows]) - times


def read_log(path: Path) -> list[Sample]:
    """Read timed requests, one JSON object a line: ``{"prompt_tokens": 12, "output_tokens": 8, "seconds": 0.31}``.

    Raises:
        SpecError: no such file, or a line that is not such an object, with its number; a line without token counts (some
            services hide them) cannot be used.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}. Give a text file with one JSON object a line.") from None
    return [_entry(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def read_helm(path: Path) -> dict[str, Runtime]:
    """Read HELM's table of idealized runtimes: model to F at profiled prompts and g.

    Raises:
        SpecError: the file does not hold one.
    """
    try:
        tables: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {
            name: helm_runtime(table["runtime_for_prompt_tokens"], table["runtime_per_output_token"])
            for name, table in tables.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is not a table of idealized runtimes ({error!r}).") from None


def helm_runtime(runtime_for_prompt_tokens: Mapping[str, float], runtime_per_output_token: float) -> Runtime:
    """A runtime from HELM's two fields; ask it with ``interp="helm"`` for HELM's figures."""
    pairs = sorted((int(p), float(t)) for p, t in runtime_for_prompt_tokens.items())
    return Runtime(
        prompt_tokens=tuple(p for p, _ in pairs), prompt_s=tuple(t for _, t in pairs), token_s=runtime_per_output_token
    )


def _entry(where: str, line: str) -> Sample:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise SpecError(f"{where} is not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise SpecError(f"{where} is not an object with prompt_tokens, output_tokens and seconds.")
    absent = [name for name in ("prompt_tokens", "output_tokens") if entry.get(name) is None]
    if absent:
        raise SpecError(
            f"{where} has no {' and no '.join(absent)}: without token counts (hidden thinking or streaming included) a time "
            "cannot be split. Log the counts the service bills, or count with the model's tokenizer."
        )
    if entry.get("seconds") is None:
        raise SpecError(f"{where} has no seconds. Write the wall time of the request.")
    try:
        return _checked(Sample(entry["prompt_tokens"], entry["output_tokens"], entry["seconds"]))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _checked(sample: Sample | tuple[int, int, float]) -> Sample:
    """The sample with its numbers checked."""
    p, o, seconds = sample
    for name, value, least in (("prompt_tokens", p, 1), ("output_tokens", o, 0)):
        if value is None:
            raise SpecError(f"A timed request has no {name}. Token counts are needed to split its time.")
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise SpecError(f"{name}={value!r} is not possible. Allowed: a whole number of {least} or more.")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | np.floating) or not 0 < seconds < np.inf:
        raise SpecError(f"seconds={seconds!r} is not possible. Allowed: a number above 0.")
    return Sample(int(p), int(o), float(seconds))


def _trials(rows: Sequence[Sample]) -> dict[tuple[int, int], int]:
    """How often each (prompt, decode steps) was timed."""
    found: dict[tuple[int, int], int] = {}
    for row in rows:
        key = (row.prompt_tokens, max(row.output_tokens - 1, 0))
        found[key] = found.get(key, 0) + 1
    return found


def _aggregate(
    rows: Sequence[Sample], statistic: Callable[[FloatArray], Any]
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """(prompt, decode steps, seconds, standard deviation) of each pair, ascending."""
    trials: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        trials.setdefault((row.prompt_tokens, max(row.output_tokens - 1, 0)), []).append(row.seconds)
    pairs = sorted(trials)
    times = [np.array(trials[pair]) for pair in pairs]
    p, steps = np.array(pairs, dtype=np.float64).T
    seconds = np.array([statistic(each) for each in times], dtype=np.float64)
    return p, steps, seconds, np.array([each.std(ddof=1) if len(each) > 1 else 0.0 for each in times])


def _reference(steps: FloatArray, seconds: FloatArray) -> tuple[float, float]:
    """(0, F) where one output token was timed, else the means, through which the line of least squares passes."""
    first = seconds[steps == 0]
    return (0.0, float(first[0])) if len(first) else (float(steps.mean()), float(seconds.mean()))


def _falls(prompts: FloatArray, found: FloatArray, noise_s: float) -> tuple[str, ...]:
    """One warning with every place where a longer prompt is faster than a shorter one by more than noise."""
    before = np.maximum.accumulate(found)
    fall = before - found
    at = np.flatnonzero(fall > np.maximum(_FALL_SIGMAS * noise_s, _FALL_SHARE * before))
    if not len(at):
        return ()
    shown = []
    for index in at:
        peak = int(np.flatnonzero(found[:index] == before[index])[0])
        shown.append(
            f"{found[index]:.4g} s at {prompts[index]:g} tokens after {found[peak]:.4g} s at {prompts[peak]:g}"
        )
    return (
        f"F falls with a longer prompt beyond the noise of {noise_s:.2g} s: {'; '.join(shown)}. Measure these again.",
    )


def _linear(keys: FloatArray, times: FloatArray, wanted: FloatArray) -> FloatArray:
    """Between neighbours; constant below the first; above the last along the last segment, never falling."""
    found = np.interp(wanted, keys, times)
    if len(keys) > 1:
        slope = max((times[-1] - times[-2]) / (keys[-1] - keys[-2]), 0.0)
        found = found + slope * np.maximum(wanted - keys[-1], 0.0)
    return found


def _upper_line(keys: FloatArray, times: FloatArray) -> tuple[float, float] | None:
    """(a, b) of the line through all prompts but the first; None where it is not one (too few points, a or b negative)."""
    if len(keys) < 3:
        return None
    slope, start = np.polyfit(keys[1:], times[1:], 1)
    return (float(start), float(slope)) if start >= 0 and slope >= 0 else None


def _ints(values: FloatArray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _joined(values: Iterable[int]) -> str:
    return "+".join(str(value) for value in values)
