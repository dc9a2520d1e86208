"""Time the requests an idealized runtime is fitted to: on our own engine, on random weights, or from a prediction alone.

An endpoint is any function of (prompt tokens, output tokens) that returns seconds.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimtab.errors import CapacityError, SpecError
from trimtab.measure.idealized import Grid, Sample
from trimtab.predict.predict import predict
from trimtab.spec.model import ModelSpec
from trimtab.spec.plan import Plan
from trimtab.units import format_bytes

if TYPE_CHECKING:
    from trimtab.model.variant import Model

Endpoint = Callable[[int, int], float]
Clock = Literal["wall", "cpu"]
Progress = Callable[[str, Iterable[Any]], Iterator[Any]]

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def _silent(label: str, items: Iterable[Any]) -> Iterator[Any]:
    del label
    yield from items


def profile(
    endpoint: Endpoint,
    points: Sequence[tuple[int, int]] | Grid,
    trials: int = 1,
    progress: Progress = _silent,
    seed: int = 0,
) -> list[Sample]:
    """Time every pair `trials` times after one warm-up; a Grid brings its own trials. See `profile_all`."""
    return profile_all({"": endpoint}, points, trials, progress, seed)[""]


def profile_all(
    endpoints: Mapping[str, Endpoint],
    points: Sequence[tuple[int, int]] | Grid,
    trials: int = 1,
    progress: Progress = _silent,
    seed: int = 0,
) -> dict[str, list[Sample]]:
    """Time several endpoints side by side.

    A trial visits all pairs once, in an order of its own, and every endpoint at each pair: a machine that slows down for a
    while slows a few trials of many pairs and of all endpoints, not all trials of one.

    Args:
        endpoints: by name.
        points: (prompt, output) pairs, or a grid of them.
        trials: repetitions; of a Grid, its own count goes.
        progress: shows the runs.
        seed: of the order.
    """
    pairs, trials = (points.points, points.trials) if isinstance(points, Grid) else (tuple(points), trials)
    rng = np.random.default_rng(seed)
    order = [pairs[index] for _ in range(trials) for index in rng.permutation(len(pairs))]
    found: dict[str, list[Sample]] = {name: [] for name in endpoints}
    if pairs:
        for run in endpoints.values():  # the first request pays for pages, caches and lazy set-up
            run(*min(pairs))
    for prompt, output in progress("timed requests", order):
        for name, run in endpoints.items():
            found[name].append(Sample(prompt, output, run(prompt, output)))
    return found


def engine_endpoint(model: Model, clock: Clock = "wall", seed: int = 0) -> Endpoint:
    """A request on our own engine: prompt of random tokens, greedy choice, stop tokens ignored.

    Args:
        model: a loaded model with whatever techniques are on it.
        clock: ``wall``; or ``cpu``, the processor time of this process, which equals wall time for one thread on an idle
            machine and leaves out what other processes take on a busy one.
        seed: of the prompts.
    """
    if clock not in CLOCKS:
        raise SpecError(f"clock={clock} is not known. Allowed: {', '.join(CLOCKS)}.")
    now, vocabulary = CLOCKS[clock], model.spec.vocab_size

    def run(prompt_tokens: int, output_tokens: int) -> float:
        ids = np.random.default_rng(seed + prompt_tokens).integers(0, vocabulary, prompt_tokens)
        session = model.session()
        try:
            start = now()
            tokens = session.prefill([ids], reserve=max(output_tokens, 1)).argmax(-1)
            for _ in range(output_tokens - 1):
                tokens = session.decode(tokens).argmax(-1)
            return now() - start
        finally:
            session.close()

    return run


def random_model(spec: ModelSpec, seed: int = 0) -> Model:
    """A model of the same architecture with random weights: time depends on shapes, so none need be downloaded.

    Raises:
        CapacityError: the weights alone are more than this machine's memory.
    """
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.weights.random import random_weights

    wanted, there = spec.weight_nbytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise CapacityError(
            f"Random weights of {spec.name} take {format_bytes(wanted)}; this machine has {format_bytes(there)}. "
            "Predict instead (--predict), or measure a smaller model."
        )
    return Model(Variant(spec, random_weights(spec, seed)))


def predicted_endpoint(plan: Plan) -> Endpoint:
    """A request priced from the graph, without any run: F is the prefill, g the mean decode step over the contexts passed.

    Args:
        plan: model, machine and stack (``hf-eager`` for a host that launches kernel by kernel); its workload's prompt and gen
            are replaced by what is asked.
    """

    def run(prompt_tokens: int, output_tokens: int) -> float:
        work = dataclasses.replace(plan.workload, prompt=prompt_tokens, gen=max(output_tokens, 1))
        figures = predict(dataclasses.replace(plan, workload=work)).figures
        first, further = (figures[name].value for name in ("ttft_s", "tpot_s"))
        return (first or 0.0) + max(output_tokens - 1, 0) * (further or 0.0)

    return run
