"""Experts under uneven routing: chances by hand, and every expectation against a simulation of tokens that choose."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import count, expert_rows, experts_touched
from trimtab.graph.ops import StepShape
from trimtab.graph.routing import busiest_rank, distinct_experts, expert_shares
from trimtab.spec.configs import load_spec
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.nodes import FFNSpec, MoESpec

_MATRIX = LinearSpec(n=32, k=32)
MOE = MoESpec(
    router=LinearSpec(n=64, k=32),
    experts=FFNSpec(gate_proj=_MATRIX, up_proj=_MATRIX, down_proj=_MATRIX),
    num_experts=64,
    num_experts_per_tok=6,
)


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (8, 8), (256, 8), (16, 1)])
def test_shares_fall_and_sum_to_the_experts_of_a_token(experts: int, topk: int, skew: float) -> None:
    shares = expert_shares(experts, topk, skew)
    assert shares.sum() == pytest.approx(topk)
    assert (np.diff(shares) <= 1e-15).all()
    assert 0 < shares[-1] <= shares[0] <= 1
    free = shares[shares < 1]  # a power law among those that are not certain
    ranks = np.arange(experts - len(free) + 1, experts + 1)
    np.testing.assert_allclose(free / free[-1], (ranks / experts) ** -skew) if len(free) else None


def test_shares_by_hand() -> None:
    # Weights 1, 1/2, 1/3: scaled to 2 the first would be 1.09, so it is certain and the others share 1 as 3 to 2.
    np.testing.assert_allclose(expert_shares(3, 2, 1.0), [1.0, 0.6, 0.4])


def test_distinct_experts_of_uniform_routing_follow_the_closed_form() -> None:
    """Mixtral, 8 tokens: U = 8 (1 - (3/4)^8) = 7.2, the value recorded kernels show (arXiv 2402.16363)."""
    assert distinct_experts(8, 2, 8) == pytest.approx(7.199, abs=1e-3)
    # The sum over experts is the closed form where all are alike.
    assert distinct_experts(8, 2, np.array([1, 8]), skew=1e-12) == pytest.approx(
        distinct_experts(8, 2, np.array([1, 8]))
    )


def choose(shares: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens [E] per expert: every token takes k different experts with exactly these chances (systematic sampling)."""
    order = rng.random((tokens, len(shares))).argsort(axis=1)
    upper = np.cumsum(shares[order], axis=1)
    start = rng.random((tokens, 1))
    hit = np.floor(upper - start) != np.floor(upper - shares[order] - start)
    return np.bincount(order[hit], minlength=len(shares))


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("experts", "topk", "ranks"), [(8, 2, 8), (64, 6, 8), (256, 8, 64), (128, 8, 4)])
def test_expectations_against_a_simulation(experts: int, topk: int, ranks: int, skew: float) -> None:
    rng = np.random.default_rng(7)
    shares = expert_shares(experts, topk, skew)
    for tokens, rounds, tolerance in ((1, 1500, 0.25), (4, 600, 0.08), (64, 100, 0.03), (512, 150, 0.02)):
        runs = [choose(shares, tokens, rng) for _ in range(rounds)]
        touched = np.mean([(run > 0).sum() for run in runs])
        busiest = np.mean([run.reshape(-1, ranks).sum(0).max() for run in runs])
        assert distinct_experts(experts, topk, tokens, skew=skew) == pytest.approx(touched, rel=0.03)
        assert busiest_rank(experts, topk, tokens, ranks, skew) == pytest.approx(busiest, rel=tolerance)
        # Dealt by popularity, the first rank has the most popular experts.
        of_one = np.mean([(run.reshape(-1, ranks)[:, 0] > 0).sum() for run in runs])
        assert distinct_experts(experts, topk, tokens, ranks, skew) == pytest.approx(of_one, rel=0.05, abs=0.03)


def test_more_skew_more_load_and_fewer_experts() -> None:
    tokens = np.array([4, 64, 1024])
    loads = [busiest_rank(64, 6, tokens, 8, skew) for skew in (0, 0.4, 0.8, 1.2)]
    distinct = [distinct_experts(64, 6, tokens, 1, skew) for skew in (0, 0.4, 0.8, 1.2)]
    assert all((a <= b + 0.2).all() for a, b in pairwise(loads))
    assert all((a >= b).all() for a, b in pairwise(distinct))
    assert (loads[0] >= tokens * 6 / 8).all()
    assert loads[0][-1] == pytest.approx(1024 * 6 / 8, rel=0.07)  # of many tokens every rank gets about as many
    assert busiest_rank(64, 6, 10, 1, 0.8) == 60


def test_what_is_not_possible_is_refused() -> None:
    for call in (
        lambda: expert_shares(4, 5),
        lambda: expert_shares(4, 1, -0.5),
        lambda: busiest_rank(8, 2, 4, 3),
    ):
        with pytest.raises(SpecError, match="Allowed"):
            call()


def test_skew_of_a_step_lowers_what_experts_read_and_leaves_what_they_compute() -> None:
    op = next(op for op in build(load_spec("mixtral-8x7b")).ops if op.name == "layers.0.mlp.experts.up_proj")
    even, skewed = (count(op, StepShape.of([8], [0], skew=skew)) for skew in (0.0, 1.0))
    assert int(skewed.flops) == int(even.flops) == 2 * 16 * 4096 * 14336
    matrix = 2 * 4096 * 14336
    assert int(even.weight_read) == round(matrix * float(distinct_experts(8, 2, 8)))
    assert int(skewed.weight_read) == round(matrix * float(distinct_experts(8, 2, 8, skew=1.0)))
    assert 4 * matrix < int(skewed.weight_read) < int(even.weight_read)


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_experts_of_the_busiest_rank(skew: float) -> None:
    """Of 64 experts on 8 ranks: where ranks exchange tokens, the tokens of all of them choose."""
    moe = dataclasses.replace(MOE, ranks=8)
    tokens = np.array([3, 40])
    for exchange, seen in ((False, tokens), (True, 8 * tokens)):
        node = dataclasses.replace(moe, exchange=exchange)
        rows, touched = expert_rows(node, tokens, skew), experts_touched(node, tokens, skew)
        np.testing.assert_array_equal(rows, np.rint(busiest_rank(64, 6, seen, 8, skew)))
        np.testing.assert_allclose(touched, distinct_experts(64, 6, seen, 8, skew))
        assert (touched <= 8).all() and (rows >= seen * 6 / 8).all()
    np.testing.assert_array_equal(expert_rows(MOE, tokens, skew), 6 * tokens)


def test_counts_of_very_many_tokens_do_not_overflow() -> None:
    step = StepShape.of([1 << 33], [0])  # held in Python integers
    rows = expert_rows(dataclasses.replace(MOE, ranks=8), step.tokens)
    assert isinstance(rows * (1 << 40), int) and rows * (1 << 40) > 1 << 63
