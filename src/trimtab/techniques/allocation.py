"""How many bits each matrix gets under a budget of bytes, time or energy: an integer program over measured sensitivities.

Matrices that an engine multiplies together (q, k and v; gate and up) get the same bits. What a choice costs in quality is measured:
each group alone is rounded and the KL divergence of the model's output is taken. What it costs in bytes is its format's; in
time and energy, what a prediction for the machine says. The program is solved by HiGHS (in scipy).

Legend: G groups of matrices, B choices of bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab.errors import MissingDependency, SpecError, TrimtabError
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.spec.workload import Workload
from trimtab.techniques.blocks import matrices

if TYPE_CHECKING:
    from trimtab.model.variant import Variant
    from trimtab.runtime.weights.packed import Packed
    from trimtab.techniques.materials import Materials

_FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
#: Units of a budget -> (what it limits, factor). A plain number is the average bits of a weight, scales not counted.
UNITS = {
    "": ("bits", 1.0),
    "B": ("bytes", 1.0), "kB": ("bytes", 1e3), "MB": ("bytes", 1e6), "GB": ("bytes", 1e9),
    "s": ("seconds", 1.0), "ms": ("seconds", 1e-3), "us": ("seconds", 1e-6),
    "J": ("joules", 1.0), "mJ": ("joules", 1e-3),
}  # fmt: skip
_NUMBER = re.compile(r"([0-9.]+(?:e-?[0-9]+)?) ?([A-Za-z]*)")
#: Most bits whose effect is measured; above, every bit more is taken to leave a quarter of it, as a finer grid does.
_MEASURED = 3
#: A decode step of this shape is what a budget of time or energy is about.
STEP = Workload(batch=1, prompt=128, gen=128)


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit: `kind` of ``bits`` (average of a weight), ``bytes`` (matrices with their scales), ``seconds`` or ``joules`` (of
    a decoded token).
    """

    kind: str
    value: float

    @staticmethod
    def of(text: str) -> Budget:
        """Read ``3.5``, ``60MB``, ``9ms`` or ``0.05J``.

        Raises:
            SpecError: another form, or not above 0.
        """
        match = _NUMBER.fullmatch(text.strip())
        if match is None or match[2] not in UNITS or float(match[1]) <= 0:
            raise SpecError(
                f"budget={text} is not possible. Allowed: average bits (3.5), bytes (60MB), time of a token (9ms) or energy of a "
                "token (0.05J)."
            )
        kind, factor = UNITS[match[2]]
        return Budget(kind, float(match[1]) * factor)


def groups(spec: ModelSpec) -> tuple[tuple[str, ...], ...]:
    """Paths of the matrices of the layers that get the same bits, in the order of the model."""
    found: dict[tuple[str, int], list[str]] = {}
    for path, _ in matrices(spec):
        parent, _, leaf = path.rpartition(".")
        fused = next((index for index, names in enumerate(_FUSED) if leaf in names), -1)
        found.setdefault((parent if fused >= 0 else path, fused), []).append(path)
    return tuple(map(tuple, found.values()))


def edits(spec: ModelSpec, bits: Sequence[int], form: Callable[[LinearSpec, int], WeightFormat]) -> list[Edit]:
    """The format of every matrix, `bits` by group.

    Raises:
        SpecError: not one number for each group.
    """
    parts = groups(spec)
    if len(bits) != len(parts):
        raise SpecError(
            f"{len(bits)} numbers of bits for the {len(parts)} groups of matrices of {spec.name}. Give one, or one per group."
        )
    nodes = dict(matrices(spec))
    return [Edit(path, "format", form(nodes[path], b)) for part, b in zip(parts, bits, strict=True) for path in part]


def allot(harm_GB: np.ndarray, cost_GB: np.ndarray, limit: float) -> list[int]:
    """Index of the choice of every group that does the least harm within the limit.

    Args:
        harm_GB, cost_GB: of every choice of every group.
        limit: on the sum of the costs.

    Raises:
        SpecError: the cheapest choices exceed the limit.
        MissingDependency: scipy is not installed.
    """
    least = float(cost_GB.min(1).sum())
    if least > limit * (1 + 1e-9):
        raise SpecError(f"The budget of {limit:.6g} is below what the cheapest choice costs, {least:.6g}. Raise it.")
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack
    except ImportError:
        raise MissingDependency(
            "Allotting bits under a budget needs scipy. Install it: pip install 'trimtab[plan]'"
        ) from None
    count, choices = harm_GB.shape
    # Costs and harms span many orders of magnitude; HiGHS wants numbers near 1.
    unit = max(float(cost_GB.max()), 1e-300)
    worst = max(float(harm_GB.max()), 1e-300)
    one_each = csr_array((np.ones(harm_GB.size), np.arange(harm_GB.size), np.arange(0, harm_GB.size + 1, choices)))
    rows = vstack([one_each, csr_array(cost_GB.reshape(1, -1) / unit)])
    low, high = np.ones(count + 1), np.ones(count + 1)
    low[-1], high[-1] = -np.inf, limit / unit
    found = milp(
        harm_GB.reshape(-1) / worst,
        integrality=np.ones(harm_GB.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, low, high),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise TrimtabError(f"HiGHS found no bits within the budget: {found.message} Raise it.")
    values = found.x.reshape(count, choices)
    return values.argmax(1).tolist()


def costs(
    spec: ModelSpec, choices: Sequence[int], form: Callable[[LinearSpec, int], WeightFormat], budget: Budget, on: str
) -> tuple[np.ndarray, float]:
    """What every choice costs [G, B], and what of the budget is left for the matrices once the rest of the step is paid.

    Args:
        spec: the model with its matrices in floats.
        choices: bits.
        form: (node, bits) -> format.
        budget: whose kind is asked for.
        on: machine of a budget of time or energy; empty = this machine, which must be calibrated.
    """
    nodes, parts = dict(matrices(spec)), groups(spec)

    def by_format(of: Callable[[LinearSpec, int], float]) -> np.ndarray:
        return np.array(
            [[sum(of(nodes[path], b) * _copies(spec, path) for path in part) for b in choices] for part in parts]
        )

    if budget.kind == "bytes":
        return by_format(lambda node, b: form(node, b).nbytes(*node.stored_shape)), budget.value
    weights = by_format(lambda node, b: b * node.n * node.k)
    if budget.kind == "bits":
        return weights, budget.value * float(by_format(lambda node, b: node.n * node.k)[:, 0].sum())
    name = "tpot_s" if budget.kind == "seconds" else "energy_j"
    lowest = edits(spec, [choices[0]] * len(parts), form)
    base = _predicted(spec.edit(lowest, by="allocation"), name, on)
    known: dict[tuple, list[float]] = {}
    for index, part in enumerate(parts):
        key = tuple((nodes[path].n, nodes[path].k, path.rpartition(".")[2], _copies(spec, path)) for path in part)
        if key in known:
            continue  # layers are alike: one prediction serves all
        known[key] = []
        for b in choices:
            bits = [choices[0]] * len(parts)
            bits[index] = b
            found = (
                base if b == choices[0] else _predicted(spec.edit(edits(spec, bits, form), by="allocation"), name, on)
            )
            known[key].append(max(found - base, 0.0))
    rows = [
        known[tuple((nodes[path].n, nodes[path].k, path.rpartition(".")[2], _copies(spec, path)) for path in part)]
        for part in parts
    ]
    if budget.value < base:
        raise SpecError(
            f"The budget of {budget.value:.4g} {budget.kind} is below the {base:.4g} that {choices[0]} bits everywhere are predicted "
            "to take. Raise it."
        )
    return np.array(rows), budget.value - base


def _copies(spec: ModelSpec, path: str) -> int:
    """Matrices that one node stands for: the experts of a layer."""
    if ".experts." not in path:
        return 1
    mlp = spec.layers[int(path.split(".")[1])].mlp
    return getattr(mlp, "num_experts", 1)


def _predicted(spec: ModelSpec, name: str, on: str) -> float:
    from trimtab.predict.predict import predict
    from trimtab.spec.machine import NATIVE, THIS, load_machine, this_machine_path
    from trimtab.techniques.plan import make_plan

    if not on and not this_machine_path().exists():
        raise SpecError(
            "A budget of time or energy on this machine needs `trimtab calibrate` first. Or name one with on=."
        )
    machine = load_machine(on or THIS)
    stack = NATIVE if machine.id == THIS else None
    plan = make_plan(
        spec, machine, STEP, dtype="file", kv_dtype="float32" if machine.id == THIS else "bfloat16", stack=stack
    )
    value = predict(plan).figures[name].value
    if value is None:
        raise SpecError(f"The machine file of {machine.id} does not say what a budget of {name} needs.")
    return value / STEP.gen if name == "energy_j" else value


def sensitivities(
    variant: Variant,
    choices: Sequence[int],
    probe: Callable[[str, int], Packed],
    materials: Materials,
    windows: int = 2,
    window: int = 128,
) -> np.ndarray:
    """KL divergence in nats that rounding each group alone brings about [G, B], on calibration text.

    Args:
        variant: the model in floats.
        choices: bits, ascending.
        probe: (path, bits) -> the matrix rounded.
        materials: calibration text.
        windows, window: how much of it.
    """
    import torch

    from trimtab.model.decoder import Decoder, Layer, run_blocks
    from trimtab.model.divergence import kl_nats
    from trimtab.runtime.step import Step

    spec = variant.spec
    pieces = dataclasses.replace(materials, window=window, windows=windows).token_windows()
    decoder = Decoder(spec, variant.weights)
    step = Step.of([len(piece) for piece in pieces], [0] * len(pieces))
    rows = np.arange(int(step.cu[-1]))
    layers: Sequence[Layer] = list(decoder.layers)  # type: ignore[arg-type]
    parts = groups(spec)
    found = np.zeros((len(parts), len(choices)))
    with torch.inference_mode():
        h_TD = decoder.embed(torch.from_numpy(np.concatenate(pieces)), step)
        inputs = []
        for layer in layers:
            inputs.append(h_TD)
            h_TD = layer(h_TD, step, None)
        base = decoder.head(h_TD, step, rows)
        for index, part in materials.progress("sensitivity of matrices", list(enumerate(parts))):
            at = int(part[0].split(".")[1])
            for place, bits in enumerate(choices):
                if bits > _MEASURED and place:
                    found[index, place] = found[index, place - 1] * 0.25 ** (bits - choices[place - 1])
                    continue
                replaced = variant.weights | _probed(variant, part, bits, probe)
                changed = Layer(at, spec.layers[at], replaced, spec.max_position_embeddings)
                h = run_blocks([changed, *layers[at + 1 :]], inputs[at], step, None)
                found[index, place] = kl_nats(base, decoder.head(h, step, rows))
    return found


def _probed(
    variant: Variant, part: Sequence[str], bits: int, probe: Callable[[str, int], Packed]
) -> Mapping[str, Packed]:
    paths = []
    for path in part:
        head, _, leaf = path.partition(".experts.")
        stored = (
            [p for p in variant.weights if p.startswith(f"{head}.experts.") and p.endswith(f".{leaf}")]
            if leaf
            else [path]
        )
        paths += stored
    return {path: probe(path, bits) for path in paths}
