"""Specs as JSON: equal when they come back, refused where this version does not know what they hold."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import SpecError
from trimtab.spec.configs import load_spec, model_ids
from trimtab.spec.serial import from_json, to_json
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all


def test_every_spec_comes_back_equal_and_with_its_hash() -> None:
    families = {
        "deepseek-v3",
        "gemma-4-26b-a4b",
        "gpt-oss-20b",
        "nemotron-h-56b",
        "qwen3-next-80b-a3b",
        "bloom-560m",
        "opt-125m",
    }
    assert families <= {*model_ids()}
    specs = [load_spec(name) for name in sorted(families)]
    small = load_spec("smollm2-135m")
    for text in ("rtn:bits=3,group=64", "tmac:bits=2", "duo", "snapkv+kivi", "think", "bfp", "cats"):
        specs.append(compose(small, parse_all([text])))
    for spec in specs:
        found = from_json(json.loads(json.dumps(to_json(spec))))
        assert found == spec and found.hash == spec.hash and type(found) is type(spec)
        assert len({id(layer) for layer in found.layers}) == len(set(found.layers))  # equal layers are one object


def test_a_spec_of_another_version_is_refused() -> None:
    data = to_json(load_spec("smollm2-135m"))
    with pytest.raises(SpecError, match="version 99"):
        from_json({**data, "version": 99})
    for broken, says in (
        ({"is": "formats:Nothing"}, "does not know"),
        ({"is": "os:system"}, "does not know"),
        ({"is": "formats:WeightFormat", "kind": "int", "bits": 4, "group": 32, "colour": 1}, "'colour'"),
        ({"is": "formats:WeightFormat", "kind": "int", "bits": 4, "group": 0}, "group=0"),
        ({"is": "formats:WeightFormat"}, "corrupt"),
    ):
        with pytest.raises(SpecError, match=says):
            from_json({"version": 1, "root": {"at": 0}, "values": [broken]})
    with pytest.raises(SpecError, match="cannot be saved"):
        to_json(parse_all(["rtn"])[0])
