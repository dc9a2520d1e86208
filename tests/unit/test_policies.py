"""What policies keep against loops over tokens and queries, the edits of their techniques, refusals, and what the store then holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import Conflict, SpecError
from trimtab.runtime.cache.policy import Evidence, newest_and_best, policy_of
from trimtab.spec.cache import Budget, HeadSpec, PageFormat, Pieces, PolicySpec, Ring, Thin
from trimtab.spec.configs import load_spec, spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import compose
from trimtab.techniques.cache.pyramidkv import PyramidKV
from trimtab.techniques.registry import parse_all

HEADS, KV_HEADS, SIZE, LAYERS = 6, 2, 8, 3
PER_HEAD = HEADS // KV_HEADS
CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
KEY, TOKEN = 2 * SIZE, 4 * SIZE  # bytes of a bf16 key, and of a key and a value
FP32 = PageFormat("fp32")


def tiny(text: str = "", kv: str = "bfloat16") -> ModelSpec:
    spec = spec_from_config(CONFIG, "tiny").with_dtype("bfloat16", kv)
    return compose(spec, parse_all([text])) if text else spec


def attention(spec: ModelSpec, layer: int = 0) -> AttentionSpec:
    node = spec.layers[layer].self_attn
    assert isinstance(node, AttentionSpec)
    return node


def head(text: str, layer: int = 0) -> HeadSpec:
    return attention(tiny(text), layer).cache.heads[0]


def policy(spec: PolicySpec | None) -> Any:
    assert spec is not None
    return policy_of(spec)


def evidence(slots: int = 23, queries: int = 5, score: bool = False, seed: int = 0) -> Evidence:
    """Two heads of three queries each; some tokens are gone already, and the queries are those of the newest tokens."""
    rng = np.random.default_rng(seed)
    shape = (KV_HEADS, slots, SIZE)
    positions = np.stack([np.sort(rng.choice(slots + 9, slots, replace=False)) for _ in range(KV_HEADS)])
    positions[:, slots - queries :] = np.arange(slots + 9, slots + 9 + queries)
    return Evidence(
        layer=1,
        heads=(0, 1),
        q=rng.standard_normal((KV_HEADS, PER_HEAD, queries, SIZE), dtype=np.float32),
        k=rng.standard_normal(shape, dtype=np.float32),
        v=rng.standard_normal(shape, dtype=np.float32),
        positions=positions,
        q_positions=np.arange(slots + 9, slots + 9 + queries),
        scale=0.4,
        score=rng.random((KV_HEADS, slots), dtype=np.float32) if score else None,
    )


def weights(seen: Evidence, h: int, p: int, s: int) -> list[float]:
    """Softmax weights of one query, token by token."""
    found = []
    for token in range(seen.k.shape[1]):
        product = sum(float(seen.q[h, p, s, i]) * float(seen.k[h, token, i]) for i in range(SIZE)) * seen.scale
        found.append(math.exp(product) if seen.positions[h, token] <= seen.q_positions[s] else 0.0)
    return [value / sum(found) for value in found]


def best(score: list[float], count: int, newest: int) -> list[int]:
    """The `newest` last ones and the largest before them, earlier ones first where equal."""
    older = len(score) - newest
    order = sorted(range(older), key=lambda slot: (-score[slot], slot))[: count - newest]
    return [*sorted(order), *range(older, len(score))]


# ----------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize(("window", "kernel", "pool"), [(5, 1, "avg"), (3, 5, "avg"), (5, 7, "max"), (1, 3, "max")])
def test_snapkv_against_loops(window: int, kernel: int, pool: str) -> None:
    spec = head(f"snapkv:cap=12,window={window},kernel={kernel},pool={pool}").policy
    seen = evidence(queries=window)
    found = policy(spec).keep(seen, 12)
    for h in range(KV_HEADS):
        older = 23 - window
        votes = [0.0] * older
        for p in range(PER_HEAD):
            for s in range(window):
                for slot, weight in enumerate(weights(seen, h, p, s)[:older]):
                    votes[slot] += weight / PER_HEAD
        near = [
            [votes[at] for at in range(slot - kernel // 2, slot + kernel // 2 + 1) if 0 <= at < older]
            for slot in range(older)
        ]
        score = [sum(group) / kernel if pool == "avg" else max(group) for group in near]
        assert found[h].tolist() == best([*score, *[0.0] * window], 12, window)


def test_pooling_is_torchs() -> None:
    import torch.nn.functional as F

    from trimtab.techniques.cache.snapkv import pooled

    score = np.random.default_rng(4).random((3, 17), dtype=np.float32)
    wanted = torch.from_numpy(score)[None]
    np.testing.assert_allclose(pooled(score, 5, "avg"), F.avg_pool1d(wanted, 5, 1, 2)[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(pooled(score, 5, "max"), F.max_pool1d(wanted, 5, 1, 2)[0].numpy())


@pytest.mark.parametrize("recent", [0.0, 0.5, 1.0])
def test_h2o_against_loops(recent: float) -> None:
    """What is kept, and what every token's score becomes; nothing else remembers the queries."""
    spec = head(f"h2o:cap=12,recent={recent}").policy
    seen = evidence(score=True)
    assert seen.score is not None
    before = seen.score.copy()
    found = policy(spec).keep(seen, 12)
    for h in range(KV_HEADS):
        score = before[h].astype(float).tolist()
        for p in range(PER_HEAD):
            for s in range(5):
                score = [old + weight for old, weight in zip(score, weights(seen, h, p, s), strict=True)]
        np.testing.assert_allclose(seen.score[h], score, rtol=1e-5)
        assert found[h].tolist() == best(score, 12, round(12 * recent))
    everything = policy(spec).keep(seen, 23)
    assert everything.tolist() == [list(range(23))] * KV_HEADS


def test_tova_against_loops() -> None:
    seen = evidence(queries=1)
    found = policy(head("tova:cap=9").policy).keep(seen, 9)
    score = [0.0] * 23
    for h in range(KV_HEADS):
        for p in range(PER_HEAD):
            score = [old + weight for old, weight in zip(score, weights(seen, h, p, 0), strict=True)]
    score[-1] = 0.0  # it stays whatever it is worth
    assert found.tolist() == [best(score, 9, 1)] * KV_HEADS


@pytest.mark.parametrize("sink", [0, 3])
def test_knorm_against_loops(sink: int) -> None:
    seen = evidence(queries=0, seed=3)
    found = policy(head(f"knorm:cap=7,sink={sink}").policy).keep(seen, 7)
    for h in range(KV_HEADS):
        score = [-math.sqrt(sum(float(x) ** 2 for x in seen.k[h, token])) for token in range(23)]
        for token in range(23):
            if seen.positions[h, token] < sink:
                score[token] = math.inf
        assert found[h].tolist() == best(score, 7, 0)


def test_think_against_loops() -> None:
    seen = evidence(queries=4)
    for by in ("query", "key"):
        thin = head(f"think:ratio=0.4,obs=4,by={by}").thin
        assert thin is not None and thin.channels == 5  # of 8, floor(3.2) go
        found = policy(thin.policy).keep(seen, thin.channels)
        for h in range(KV_HEADS):
            score = []
            for i in range(SIZE):
                keys = sum(float(seen.k[h, t, i]) ** 2 for t in range(23)) / 23
                queries = sum(float(seen.q[h, p, s, i]) ** 2 for p in range(PER_HEAD) for s in range(4))
                score.append(keys * queries / (4 * PER_HEAD) if by == "query" else keys)
            assert found[h].tolist() == sorted(sorted(range(SIZE), key=lambda i: (-score[i], i))[:5])


def test_think_warns_of_a_prompt_with_too_few_queries() -> None:
    thin = head("think:obs=5").thin
    assert thin is not None
    with pytest.warns(UserWarning, match=r"think: the prompt has 4 tokens, fewer than obs=5"):
        policy(thin.policy).keep(evidence(queries=4), 5)


def test_think_at_random_differs_by_head_and_layer_and_repeats() -> None:
    thin = head("think:ratio=0.5,by=random").thin
    assert thin is not None
    seen = evidence(queries=0)
    found = policy(thin.policy).keep(seen, 4)
    assert found.shape == (KV_HEADS, 4) and (np.diff(found, axis=1) > 0).all()
    np.testing.assert_array_equal(policy(thin.policy).keep(seen, 4), found)
    many = [tuple(policy(thin.policy).keep(Evidence(i, (0,), *_rest(seen)), 4)[0]) for i in range(20)]
    assert len(set(many)) > 10


def _rest(seen: Evidence) -> tuple[Any, ...]:
    return (
        seen.q[:1], seen.k[:1], seen.v[:1], seen.positions[:1], seen.q_positions, seen.scale,
    )  # fmt: skip


def test_of_equal_scores_the_earlier_token_stays() -> None:
    assert newest_and_best(np.zeros((1, 6), np.float32), 4, 1).tolist() == [[0, 1, 2, 5]]


# -------------------------------------------------------------------------------------------------------------- edits


def test_edits_of_budgets() -> None:
    snap = head("snapkv:cap=40,window=8")
    assert snap.keep == Budget(40, "prompt")
    assert snap.policy is not None and (snap.policy.queries, snap.policy.products, snap.policy.score) == (
        8,
        True,
        False,
    )
    h2o = head("h2o:cap=40,recent=0.25")
    assert h2o.keep == Budget(40, "pass") and h2o.policy is not None
    assert (h2o.policy.queries, h2o.policy.products, h2o.policy.score) == (-1, True, True)
    assert h2o.policy.params == (("recent", 10),)
    tova, knorm = head("tova:cap=9"), head("knorm:cap=9")
    assert tova.policy is not None and knorm.policy is not None
    assert (tova.keep, tova.policy.queries) == (Budget(9, "pass"), 1)
    assert (knorm.keep, knorm.policy.queries, knorm.policy.products) == (Budget(9, "prompt"), 0, False)
    assert head("think:ratio=0").thin is None
    assert head("think:ratio=0.4,obs=16,recent=5").thin == Thin(
        5, 5, PolicySpec("trimtab.techniques.cache.think:LargeChannels", (("by", "query"), ("obs", 16)), queries=16)
    )
    assert [head("quest:budget=32,skip=1", layer).select for layer in range(3)] == [None, Pieces(32), Pieces(32)]


@pytest.mark.parametrize("layers", [1, 2, 5, 30, 61])
@pytest.mark.parametrize(("cap", "window", "beta"), [(1024, 32, 20), (100, 9, 7), (50, 8, 1), (64, 32, 100)])
def test_budgets_of_pyramidkv_fall_linearly_and_their_mean_is_cap(
    layers: int, cap: int, window: int, beta: int
) -> None:
    pyramid = PyramidKV(cap=cap, window=window, beta=beta)
    found = pyramid.budgets(layers)
    least = (cap - window) // beta
    most = 2 * (cap - window) - least
    assert sum(found) == cap * layers
    if layers > 1:
        line = [window + most - (most - least) * i / (layers - 1) for i in range(layers)]
        assert (found[0], found[-1]) == (window + most, window + least)
        assert max(abs(a - b) for a, b in zip(found, line, strict=True)) < 1
    spec = tiny(f"pyramidkv:cap={cap},window={window},beta={beta}")
    kept = [attention(spec, layer).cache.heads[0].keep for layer in range(LAYERS)]
    assert kept == [Budget(each) for each in pyramid.budgets(LAYERS)]


def test_the_papers_budgets() -> None:
    """Heads of 64 keep 39 channels at the paper's ratio; 32 layers with a mean of 2048 keep from 3964 to 132 tokens."""
    spec = compose(load_spec("smollm2-135m"), parse_all(["think"]))
    thin = attention(spec).cache.heads[0].thin
    assert thin is not None and thin.channels == 39  # floor(0.4 x 64) = 25 go
    budgets = PyramidKV(cap=2048, window=32).budgets(32)
    assert (budgets[0], budgets[-1]) == (3964, 132)


def test_windows_are_left_alone() -> None:
    """Gemma-2 alternates layers with and without a window."""
    base = load_spec("gemma-2-2b")
    for text in ("snapkv", "pyramidkv", "h2o", "tova", "knorm", "quest:skip=0"):
        spec = compose(base, parse_all([text]))
        changed = [old.self_attn != new.self_attn for old, new in zip(base.layers, spec.layers, strict=True)]
        assert changed == [layer.self_attn.window is None for layer in base.layers]  # type: ignore[union-attr]
    spec = compose(base, parse_all(["pyramidkv"]))
    kept = [attention(spec, layer).cache.heads[0].keep for layer in range(base.num_hidden_layers)]
    budgets = [keep.tokens for keep in kept if isinstance(keep, Budget)]
    assert sum(budgets) == 1024 * len(budgets)


def test_recurrent_layers_are_left_alone_and_latent_attention_is_refused() -> None:
    for text in ("snapkv", "pyramidkv", "h2o", "tova", "knorm", "quest", "think", "a-shape", "tri-shape"):
        with pytest.raises(SpecError, match=rf"^{text}: .*latent.*Allowed"):
            compose(load_spec("deepseek-v3"), parse_all([text]))
    base = load_spec("qwen3-next-80b-a3b")
    spec = compose(base, parse_all(["knorm"]))
    changed = [old.self_attn != new.self_attn for old, new in zip(base.layers, spec.layers, strict=True)]
    assert changed == [isinstance(layer.self_attn, AttentionSpec) for layer in base.layers] and 0 < sum(changed) < 48


# ----------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize(
    "text",
    [
        "snapkv:cap=40+kivi:group=8,residual=8", "kivi:group=8,residual=8+snapkv:cap=40",
        "knorm:cap=40+kivi:group=8,residual=8", "pyramidkv:cap=40+kivi:group=8,residual=8",
        "think+kivi:group=8,residual=8", "kivi:group=8,residual=8+think", "snapkv:cap=40+think", "think+knorm:cap=40",
        "snapkv:cap=40+think+kivi:group=8,residual=8", "a-shape+snapkv:cap=40", "tri-shape+kivi:group=8,residual=8",
        "a-shape+quest:budget=32", "quest:budget=32+rtn:bits=4,group=16",
    ],
)  # fmt: skip
def test_what_goes_together(text: str) -> None:
    assert tiny(text) != tiny()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("h2o:cap=40+kivi:group=8,residual=8", "moved"), ("kivi:group=8,residual=8+h2o:cap=40", "moved"),
        ("tova:cap=40+kivi:group=8,residual=8", "moved"), ("tova:cap=40+think", "moved"), ("think+h2o:cap=40", "moved"),
        ("quest:budget=32+kivi:group=8,residual=8", "bounds"), ("kivi:group=8,residual=8+quest:budget=32", "bounds"),
        ("quest:budget=32+snapkv:cap=40", "bounds"), ("h2o:cap=40+quest:budget=32", "bounds"),
        ("think+quest:budget=32", "bounds"), ("quest:budget=32+streaming-llm", "bounds"),
        ("streaming-llm+quest", "ring"),
        ("streaming-llm+think", "ring"), ("think+streaming-llm", "ring"), ("think+bfp:block=8", "tail"),
        ("bfp:block=8+think", "coded"), ("a-shape+streaming-llm", "forgets"), ("tri-shape+h2o:cap=40", "forgets"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused_with_a_sentence(text: str, word: str) -> None:
    with pytest.raises(SpecError, match=word) as refused:
        tiny(text)
    assert "Allowed" in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("streaming-llm", "snapkv"), ("snapkv", "streaming-llm"), ("h2o", "streaming-llm"), ("tova", "h2o"),
        ("pyramidkv", "knorm"), ("snapkv", "knorm"), ("a-shape", "tri-shape"),
    ],
)  # fmt: skip
def test_two_that_choose_conflict_by_name(one: str, other: str) -> None:
    with pytest.raises(Conflict) as refused:
        tiny(f"{one}+{other}")
    assert one in str(refused.value) and other in str(refused.value)


def test_think_refuses_a_cache_coded_as_it_comes() -> None:
    with pytest.raises(SpecError, match=r"^think: .*int8.*Allowed"):
        compose(tiny(kv="int8"), parse_all(["think"]))


def test_heads_with_rings_are_left_to_them() -> None:
    """Half of the heads keep a ring: thin keys and chosen pages are for the others."""
    edits = [Edit(f"layers.{layer}.self_attn.cache.heads.1", "keep", Ring(2, 6)) for layer in range(LAYERS)]
    spec = tiny().edit(edits, by="duo")
    for text, field in (("quest:skip=0", "select"), ("think", "thin")):
        first, second = attention(compose(spec, parse_all([text]))).cache.heads
        assert getattr(first, field) is not None and getattr(second, field) is None


# ---------------------------------------------------------------------------------------------------------- the store


class Watched:
    """A runner that notes the rotated queries [T, N, H] and keys [T, G, H] of every layer and pass."""

    def __init__(self, model: Any) -> None:
        self.runner = model.runner()
        self.spec, self.open_store, self.keep_tokens = model.spec, self.runner.open_store, self.runner.keep_tokens
        self.seen: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

    def forward(self, tokens: Any, step: Any, store: Any, logits_rows: Any) -> Any:
        noted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.seen.append(noted)

        def tap(path: str, value: Any) -> None:
            noted[path] = value[0].detach().numpy().copy(), value[1].detach().numpy().copy()

        step.taps = {"self_attn.qk": tap}
        return self.runner.forward(tokens, step, store, logits_rows)


def votes(q: np.ndarray, at_q: list[int], keys: dict[int, np.ndarray], held: list[int]) -> dict[int, float]:
    """Sum over queries [s, H] of their softmax over the held positions they may see, by position."""
    found = dict.fromkeys(held, 0.0)
    for query, at in zip(q, at_q, strict=True):
        near = [position for position in held if position <= at]
        scores = np.array([query @ keys[position] for position in near], np.float64) / math.sqrt(q.shape[1])
        shares = np.exp(scores - scores.max())
        for position, share in zip(near, shares / shares.sum(), strict=True):
            found[position] += float(share)
    return found


def replay(passes: list[dict[str, Any]], prompt: int, layer: int, h: int, heads: int, text: str) -> list[int]:
    """Positions a KV head holds in the end, found from its queries and keys pass by pass."""
    name, cap = text.partition(":")[0], int(text.partition("cap=")[2].partition(",")[0])
    keys: dict[int, np.ndarray] = {}
    held: list[int] = []
    score: dict[int, float] = {}
    queries: list[np.ndarray] = []
    past = 0
    for noted in passes:
        q, k = noted[f"layers.{layer}.self_attn"]
        at = list(range(past, past + len(q)))
        past += len(q)
        keys |= dict(zip(at, k[:, h], strict=True))
        held += at
        group = [q[:, n] for n in range(h * heads, (h + 1) * heads)]
        queries = [np.concatenate((old, new)) for old, new in zip(queries, group, strict=True)] if queries else group
        if name == "h2o":
            score = {position: score.get(position, 0.0) for position in held}
            for own in group:
                for position, share in votes(own, at, keys, held).items():
                    score[position] += share
            if len(held) > cap:
                newest = held[len(held) - cap // 2 :]
                older = [p for p in held if p not in newest]
                older.sort(key=lambda p: (-score[p], p))
                held = sorted([*older[: cap - len(newest)], *newest])
        elif name == "snapkv" and past == prompt and len(held) > cap:
            window = held[-3:]
            shares = [votes(own[-3:], window, keys, held) for own in queries]
            older = held[:-3]
            mean = [sum(share[p] for share in shares) / heads for p in older]
            near = [sum(mean[max(i - 2, 0) : i + 3]) / 5 for i in range(len(older))]
            chosen = sorted(range(len(older)), key=lambda i: (-near[i], i))[: cap - 3]
            held = sorted([*(older[i] for i in chosen), *window])
        elif name == "knorm" and past == prompt and len(held) > cap:
            held = sorted(sorted(held, key=lambda p: (float(keys[p] @ keys[p]), p))[:cap])
    return held


@pytest.mark.parametrize("text", ["snapkv:cap=12,window=3", "h2o:cap=12", "knorm:cap=12"])
@pytest.mark.parametrize("chunk", [11, 512])
def test_the_store_holds_what_the_policy_says(tiny_model: Any, tiny_materials: Any, text: str, chunk: int) -> None:
    """Every layer and head, after a prompt and five tokens, against a replay of the queries and keys of the run."""
    from trimtab.runtime.engine.generate import Session
    from trimtab.techniques.apply import applied

    prompt = np.random.default_rng(7).integers(0, 131, 40)
    with applied(tiny_model, text, materials=tiny_materials) as model:
        runner = Watched(model)
        session = Session(runner, chunk=chunk)
        session.prefill([prompt])
        for token in range(5):
            session.decode([token])
        (seq,) = session.seqs
        for layer, rows in enumerate(seq._rows):
            for row in rows:
                for index, h in enumerate(row.heads):
                    positions = np.broadcast_to(row.token_positions(), (len(row.heads), row.held))[index].tolist()
                    assert positions == replay(runner.seen, 40, layer, h, PER_HEAD, text), (layer, h)
