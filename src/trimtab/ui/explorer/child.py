"""The measuring process of the explorer: a case on standard input, lines of progress on standard output, the run in the ledger."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from trimtab.errors import TrimtabError
from trimtab.ui.explorer.measuring import Step
from trimtab.ui.explorer.types import Case


def steps(label: str, items: Iterable[Any]) -> Iterator[Any]:
    """Pass items on and write a line before each, and one after the last."""
    found = list(items)
    for done, item in enumerate(found):
        _write(Step(label, done, len(found)))
        yield item
    _write(Step(label, len(found), len(found)))


def _write(step: Step) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(step) + b"\n")
    sys.stdout.buffer.flush()


def main() -> int:
    """Measure; as `trimtab measure`, exit codes 0 and 2."""
    case = msgspec.json.decode(sys.stdin.buffer.read(), type=Case)
    from trimtab.measure.measure import compare, ensure_calibrated, prepare
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    try:
        ensure_calibrated(steps)
        work = Workload(batch=case.batch, prompt=case.prompt, gen=case.gen)
        plan = make_plan(case.model, "this", work, case.techniques, dtype=case.dtype, kv_dtype=case.kv_dtype)
        base, variant = prepare(plan, progress=steps)
        compare([base, variant] if plan.techniques else [base], progress=steps)
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
