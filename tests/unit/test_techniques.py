"""One battery over every registered technique: a new technique gets all of it by two lines in `CASES`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import Conflict, SpecError
from trimtab.measure.savings import metered, require_saving
from trimtab.spec.tree import Edit
from trimtab.techniques import registry
from trimtab.techniques.apply import applied, derive
from trimtab.techniques.base import Stage, Technique, compose
from trimtab.techniques.registry import parse_all, parse_technique, spec_string, technique_names

pytestmark = pytest.mark.filterwarnings("ignore:think. the prompt has")  # some are of one token

GATES = Path(__file__).parents[1] / "fixtures" / "duo" / "tiny-llama.tsv"


@dataclass(frozen=True)
class Case:
    """What the battery needs to know about a technique: two settings, a neutral one, and bad ones."""

    settings: tuple[str, str]
    neutral: str | None
    bad: tuple[str, ...]
    saves_time_only: bool = False  # no count falls; its paper's checks time it


CASES = {
    "rtn": Case(
        ("rtn:bits=4,group=16", "rtn:bits=3,group=32,sym=false"),
        None,
        ("rtn:bits=1", "rtn:bits=9", "rtn:group=0", "rtn:group=37"),
    ),
    "gptq": Case(
        (
            "gptq:bits=4,group=16,samples=512,window=128",
            "gptq:bits=3,group=32,sym=false,order=none,samples=256,window=128",
        ),
        None,
        ("gptq:bits=1", "gptq:group=0", "gptq:group=37", "gptq:damp=0", "gptq:tokens=x", "gptq:order=y"),
    ),
    "bitmod": Case(
        ("bitmod:bits=4,group=32", "bitmod:group=16,scale_bits=16,metric=awq,base=awq"),
        None,
        (
            "bitmod:bits=2",
            "bitmod:bits=6,types=ant",
            "bitmod:types=nf4",
            "bitmod:group=8",
            "bitmod:group=64",
            "bitmod:group=1024",
            "bitmod:bits=4,types=mx",
            "bitmod:scale_bits=4",
            "bitmod:metric=kl",
            "bitmod:base=omniquant",
            "bitmod:types=intasym,metric=awq",
        ),
    ),
    "olive": Case(
        ("olive:abits=16,normal=flint,search=75:250:50", "olive:search=100:250:50"),
        None,
        (
            "olive:wbits=3",
            "olive:wbits=16",
            "olive:abits=6",
            "olive:normal=nf4",
            "olive:normal=ifif",
            "olive:wbits=8,abits=16,normal=flint",
            "olive:sigma=0",
            "olive:search=75:250",
            "olive:search=250:75:2",
            "olive:kv=1",
            "olive:both=right",
        ),
    ),
    "awq": Case(
        (
            "awq:bits=4,group=16,samples=512,window=128",
            "awq:bits=3,group=32,sym=true,search=false,samples=256,window=128",
        ),
        None,
        ("awq:bits=9", "awq:group=-1", "awq:group=37", "awq:tokens=x", "awq:samples=0"),
    ),
    "shiftadd": Case(
        (
            "shiftadd:bits=2,group=16,samples=512,window=128",
            "shiftadd:bits=3,mode=acc,group=-1,apot=2,samples=256,window=128",
        ),
        None,
        (
            "shiftadd:bits=0",
            "shiftadd:bits=5",
            "shiftadd:bits=2.5",
            "shiftadd:group=12",
            "shiftadd:group=0",
            "shiftadd:apot=0",
            "shiftadd:mode=x",
            "shiftadd:rounds=-1",
            "shiftadd:mix=2:0.5|3:0.2",
            "shiftadd:mix=2",
            "shiftadd:damp=2",
        ),
    ),
    "cats": Case(
        ("cats:sparsity=0.5", "cats:sparsity=0.8,prefill_sparse=false"),
        "cats:sparsity=0",
        ("cats:sparsity=1", "cats:sparsity=-1", "cats:sparsity=0.1|0.2"),
    ),
    "gemfilter": Case(
        ("gemfilter:layer=1,topk=7", "gemfilter:layer=0,topk=5,pool=3"),
        "gemfilter:layer=1,topk=100000",
        ("gemfilter:topk=0", "gemfilter:pool=2", "gemfilter:layer=99", "gemfilter:layer=-1", "gemfilter:layer=x"),
    ),
    "flashdecpp": Case(
        ("flashdecpp", "flashdecpp:phi=0.5,split=16,dataflow=flat"),
        "flashdecpp:phi=0",
        ("flashdecpp:a=1,b=1", "flashdecpp:split=0", "flashdecpp:phi=nan", "flashdecpp:phi=1|2"),
        saves_time_only=True,
    ),
    "streaming-llm": Case(
        ("streaming-llm:sink=2,recent=6", "streaming-llm:sink=0,recent=9"),
        "streaming-llm:sink=4,recent=100000",
        ("streaming-llm:sink=-1", "streaming-llm:recent=0"),
    ),
    "kivi": Case(
        ("kivi:group=8,residual=8", "kivi:kbits=4,vbits=8,group=8,residual=16"),
        "kivi:group=8,residual=4096",
        (
            "kivi:bits=3",
            "kivi:kbits=5",
            "kivi:group=0",
            "kivi:group=12",
            "kivi:residual=100",
            "kivi:group=48,residual=48",
        ),
    ),
    "bfp": Case(
        ("bfp:block=8", "bfp:man=8,block=16,on=kv,sort=random"),
        None,
        ("bfp:man=1", "bfp:exp=3", "bfp:block=32", "bfp:block=6", "bfp:on=w"),
    ),
    "duo": Case(
        (f'duo:sink=1,recent=4,gates="{GATES}"', f'duo:sparsity=0.75,sink=2,recent=6,gates="{GATES}"'),
        f'duo:sparsity=0,gates="{GATES}"',
        (f'duo:sparsity=1.2,gates="{GATES}"', f'duo:recent=0,gates="{GATES}"', "duo:gates=llama-3.1-8b", "duo"),
    ),
    "snapkv": Case(
        ("snapkv:cap=8,window=3", "snapkv:cap=6,window=2,kernel=3,pool=max"),
        "snapkv:cap=100000",
        ("snapkv:cap=32", "snapkv:window=0", "snapkv:kernel=4", "snapkv:kernel=-1", "snapkv:pool=sum"),
    ),
    "pyramidkv": Case(
        ("pyramidkv:cap=8,window=3", "pyramidkv:cap=10,window=2,kernel=3,beta=4"),
        "pyramidkv:cap=100000",
        ("pyramidkv:cap=7", "pyramidkv:window=-1", "pyramidkv:kernel=2", "pyramidkv:beta=0", "pyramidkv:pool=x"),
    ),
    "h2o": Case(
        ("h2o:cap=8", "h2o:cap=9,recent=0.2"), "h2o:cap=100000", ("h2o:cap=0", "h2o:recent=1.5", "h2o:recent=-0.1")
    ),
    "tova": Case(("tova:cap=8", "tova:cap=1"), "tova:cap=100000", ("tova:cap=0", "tova:cap=x")),
    "knorm": Case(
        ("knorm:cap=8", "knorm:cap=6,sink=2"),
        "knorm:cap=100000",
        ("knorm:cap=0", "knorm:sink=-1", "knorm:cap=4,sink=5"),
    ),
    "vattn": Case(
        ("vattn:page=4096,max_len=256", "vattn:layout=mega,max_len=256,async=false,max_batch=8"),
        "vattn",
        (
            "vattn:page=5000",
            "vattn:page=0",
            "vattn:page=x",
            "vattn:max_batch=0",
            "vattn:max_batch=1000",
            "vattn:max_len=0",
            "vattn:eager_steps=-1",
            "vattn:eager_blocks=-1",
            "vattn:layout=x",
            "vattn:async=x",
        ),
        saves_time_only=True,
    ),
    "quest": Case(
        ("quest:budget=8,page=4,skip=1", "quest:budget=6,page=3,skip=0"),
        "quest:budget=4096",
        ("quest:page=0", "quest:budget=0", "quest:budget=24", "quest:skip=-1", "quest:skip=3"),
    ),
    "think": Case(
        ("think:ratio=0.4,obs=4,recent=4", "think:ratio=0.5,recent=0,by=key"),
        "think:recent=100000",
        ("think:ratio=1", "think:ratio=-0.1", "think:obs=0", "think:recent=-1", "think:value_ratio=0.5", "think:by=v"),
    ),
    # The decoder masks what is hidden; where attention skips tiles, pairs fall as the counts say.
    "a-shape": Case(
        ("a-shape:sink=2,local=5", "a-shape:sink=0,local=8"),
        "a-shape:sink=4,local=100000",
        ("a-shape:sink=-1", "a-shape:local=0"),
        saves_time_only=True,
    ),
    "tri-shape": Case(
        ("tri-shape:sink=2,local=5,last=3", "tri-shape:sink=0,local=4,last=1"),
        "tri-shape:sink=4,local=5,last=100000",
        ("tri-shape:sink=-1", "tri-shape:local=0", "tri-shape:last=0"),
        saves_time_only=True,
    ),
    # Counts stay: what falls is the energy of multipliers, which `predict.energy` prices.
    "lmul": Case(
        ("lmul:mantissa=3,acc=bf16", "lmul:scope=all,mantissa=7,exp=5"),
        None,
        (
            "lmul:mantissa=1",
            "lmul:mantissa=24",
            "lmul:exp=6",
            "lmul:scope=softmax",
            "lmul:scope=attn|mlp",
            "lmul:acc=fp64",
            "lmul:round=up",
            "lmul:carry=float",
            "lmul:offset=9",
            "lmul:offset=x",
        ),
        saves_time_only=True,
    ),
    "bipolar": Case(
        ("bipolar:wbits=2,abits=3,group=32,backend=cpu-popcnt", "bipolar:wbits=4,abits=16,wscale=absmax"),
        None,
        (
            "bipolar:wbits=0",
            "bipolar:wbits=9",
            "bipolar:abits=0",
            "bipolar:abits=9",
            "bipolar:abits=16,backend=cpu-popcnt",
            "bipolar:group=16",
            "bipolar:group=64",
            "bipolar:wscale=max",
            "bipolar:ascale=max",
            "bipolar:backend=triton",
            "bipolar:backend=neon",
        ),
    ),
    "llm-int8": Case(
        ("llm-int8:threshold=2.5,outlier_source=dequant", "llm-int8:threshold=2,include=mlp"),
        None,
        (
            "llm-int8:threshold=0",
            "llm-int8:threshold=x",
            "llm-int8:threshold=nan",
            "llm-int8:outlier_source=int8",
            "llm-int8:granularity=column",
            "llm-int8:outliers=never",
            "llm-int8:include=head",
            "llm-int8:weight_axis=in",
            "llm-int8:lm_head=true",
        ),
    ),
    "tmac": Case(
        ("tmac:bits=2,group=32,kernel=lut", "tmac:bits=ternary,group=-1"),
        None,
        (
            "tmac:bits=5",
            "tmac:bits=x",
            "tmac:group=33",
            "tmac:group=16",
            "tmac:group=100000",
            "tmac:group=x",
            "tmac:g=3",
            "tmac:act_group=48",
            "tmac:table=i4",
            "tmac:fast_agg=1,table=i16",
            "tmac:fast_agg=1,kernel=vnni",
            "tmac:bits=ternary,zp=1",
            "tmac:group=tensor",
            "tmac:isa=neon",
            "tmac:kernel=amx",
            "tmac:threads=-1",
        ),
    ),
}
SETTINGS = [setting for case in CASES.values() for setting in case.settings]
PAIRS = [
    "rtn:bits=4,group=16+cats:sparsity=0.5",
    "bitmod:bits=4,group=32+gemfilter:layer=1,topk=7",
    "olive:normal=int,search=100:250:50+kivi:bits=4,group=8,residual=8",
    "rtn:bits=4,group=16+gemfilter:layer=1,topk=7",
    "rtn:bits=4,group=16+streaming-llm:sink=2,recent=6",
    "rtn:bits=4,group=16+tmac:kernel=lut",
    "bipolar:wbits=1,abits=2,backend=cpu-vnni+streaming-llm:sink=2,recent=6",
    "llm-int8:threshold=2.5+kivi:group=8,residual=8",
    "llm-int8:threshold=2.5,include=attention+cats:sparsity=0.5",
    "llm-int8:decompose=false+gemfilter:layer=1,topk=7",
    "tmac:bits=3,group=32,kernel=lut+gemfilter:layer=1,topk=7",
    "cats:sparsity=0.5+gemfilter:layer=1,topk=7",
    "cats:sparsity=0.5+streaming-llm:sink=2,recent=6",
    "gemfilter:layer=1,topk=7+streaming-llm:sink=2,recent=4",
    "kivi:group=8,residual=8+streaming-llm:sink=2,recent=4",
    "kivi:bits=4,group=8,residual=8+gemfilter:layer=1,topk=7",
    f'kivi:group=8,residual=8+duo:sink=1,recent=4,gates="{GATES}"',
    "snapkv:cap=12,window=3+kivi:group=8,residual=8",
    "kivi:bits=4,group=8,residual=8+knorm:cap=12",
    "kivi:bits=4,group=8,residual=8+think:ratio=0.5,obs=4",
    "pyramidkv:cap=9,window=3+think:ratio=0.4,obs=3,recent=2",
    "snapkv:cap=20,window=3+think:ratio=0.4,obs=5+kivi:group=8,residual=8",
    "h2o:cap=8+gemfilter:layer=1,topk=12",
    "rtn:bits=4,group=16+tova:cap=8",
    "a-shape:sink=1,local=6+snapkv:cap=8,window=3",
    "rtn:bits=4,group=16+lmul:scope=linear",
    f'duo:sink=1,recent=4,gates="{GATES}"+quest:budget=8,page=4,skip=0',
]
#: These do not go with a ring in every head.
NO_RINGS = (
    "vattn",
    "streaming",
    "duo",
    "snapkv",
    "pyramidkv",
    "h2o",
    "tova",
    "knorm",
    "quest",
    "think",
    "a-shape",
    "tri-shape",
)
PROMPTS = {1: [[5]], 3: [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [2, 7, 1], list(range(40, 71))]}


def test_every_technique_has_a_case() -> None:
    assert set(technique_names()) == set(CASES)


def _logits(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """Logits after the prompt and after two decode steps, through the technique's own cache."""
    session = model.session()
    found = [session.prefill(prompts)]
    for step in range(2):
        found.append(session.decode([7 + step + row for row in range(len(prompts))]))
    return np.stack(found)


@pytest.mark.parametrize("setting", SETTINGS + PAIRS)
@pytest.mark.parametrize("batch", PROMPTS)
def test_runs_and_restores(tiny_model: Any, tiny_materials: Any, setting: str, batch: int) -> None:
    prompts = PROMPTS[batch]
    before = _logits(tiny_model, prompts)
    with applied(tiny_model, setting, materials=tiny_materials) as model:
        inside = _logits(model, prompts)
        assert inside.shape == before.shape and np.isfinite(inside).all()
    np.testing.assert_array_equal(_logits(tiny_model, prompts), before)


@pytest.mark.parametrize("setting", [case.neutral for case in CASES.values() if case.neutral])
def test_neutral_parameter_is_exact(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    before = _logits(tiny_model, PROMPTS[3])
    with applied(tiny_model, setting, materials=tiny_materials) as model:
        np.testing.assert_allclose(_logits(model, PROMPTS[3]), before, atol=2e-5)  # another order of the same sums


@pytest.mark.parametrize("setting", SETTINGS)
def test_restores_after_exception_and_nesting(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    before = _logits(tiny_model, PROMPTS[3])
    with pytest.raises(KeyError), applied(tiny_model, setting, materials=tiny_materials):
        raise KeyError("inside")
    np.testing.assert_array_equal(_logits(tiny_model, PROMPTS[3]), before)
    outer = "rtn:bits=8,group=16" if setting.startswith(NO_RINGS) else "streaming-llm:sink=1,recent=5"
    with applied(tiny_model, outer, materials=tiny_materials) as model:
        middle = _logits(model, PROMPTS[3])
        try:
            with applied(model, setting, materials=tiny_materials):
                pass
        except SpecError as refused:  # cats on weights that are packed already
            assert "rounding twice" in str(refused)
        np.testing.assert_array_equal(_logits(model, PROMPTS[3]), middle)
    np.testing.assert_array_equal(_logits(tiny_model, PROMPTS[3]), before)


@pytest.mark.parametrize(
    "setting", [s for name, case in CASES.items() for s in case.settings if not case.saves_time_only] + PAIRS
)
def test_saves_something_metered(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    prompts = PROMPTS[3][2:]
    before = metered(tiny_model, prompts)
    with applied(tiny_model, setting, materials=tiny_materials) as model:
        assert require_saving(setting, before, metered(model, prompts))


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, case in CASES.items() for bad in case.bad])
def test_bad_parameters_are_refused_with_a_sentence(tiny_model: Any, name: str, bad: str) -> None:
    with pytest.raises(SpecError) as refused:
        compose(tiny_model.spec, parse_all([bad]))
    message = str(refused.value)
    assert message.startswith(name) and ("llowed" in message or "Give one" in message)


@pytest.mark.parametrize("setting", SETTINGS)
def test_spec_string_round_trip(setting: str) -> None:
    technique = parse_technique(setting)
    assert parse_technique(spec_string(technique)) == technique


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(2, 8), group=st.integers(1, 512), sym=st.booleans())
def test_rtn_spec_string_round_trip(bits: int, group: int, sym: bool) -> None:
    technique = registry.technique_class("rtn")(bits=bits, group=group, sym=sym)
    assert parse_technique(str(technique)) == technique


def test_two_writers_of_one_field_conflict(tiny_model: Any) -> None:
    with pytest.raises(Conflict, match=r"rtn:bits=8,group=16.*rtn:group=16.*format"):
        compose(tiny_model.spec, parse_all(["rtn:bits=4,group=16", "rtn:bits=8,group=16"]))


def test_weights_are_shared_not_copied(tiny_model: Any, tiny_materials: Any) -> None:
    variant = derive(tiny_model.variant, parse_all(["streaming-llm"]), tiny_materials)
    assert all(variant.weights[path] is tiny_model.weights[path] for path in variant.weights)


# ------------------------------------------------------------------------------------------- planted impostors


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOp(Technique):
    """Changes nothing."""

    name: ClassVar[str] = "no-op"
    summary: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class Renames(Technique):
    """Writes another name and leaves every byte where it is."""

    name: ClassVar[str] = "renames"
    summary: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def edits(self, spec: Any) -> Iterator[Edit]:
        for path, _ in spec.linears():
            if path.startswith("layers."):
                yield Edit(path, "layout", "transposed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks(Technique):
    """Sets half of every matrix to zero and keeps it dense: a mask that poses as pruning."""

    name: ClassVar[str] = "masks"
    summary: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def convert(self, weights: Any, old: Any, new: Any, materials: Any) -> Any:
        from trimtab.runtime.weights.packed import packed_float

        masked = {}
        for path, node in new.linears():
            if path.startswith("layers."):
                data = weights[path].buffers["data"].copy()
                data[np.abs(data) < np.median(np.abs(data))] = 0
                masked[path] = packed_float(data, node.format.kind)
        return weights | masked


@pytest.mark.parametrize("impostor", [NoOp(), Renames(), Masks()], ids=lambda technique: technique.name)
def test_impostors_are_rejected(tiny_model: Any, tiny_materials: Any, impostor: Technique) -> None:
    before = metered(tiny_model, PROMPTS[3])
    tiny_model.push(derive(tiny_model.variant, [impostor], tiny_materials))
    try:
        after = metered(tiny_model, PROMPTS[3])
    finally:
        tiny_model.pop()
    with pytest.raises(SpecError, match="saves nothing"):
        require_saving(impostor.name, before, after)
