"""Dialogues from the user's files: the jsonl of SCBench, one dialogue a line.

``{"id": ..., "context": text, "multi_turns": [{"input": question, "answer": text, number or list, "options": [...],
"task": name}, ...]}``; files named as theirs (``scbench_kv.jsonl``) are scored by their rules.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.measure.kv.dialogue import Dialogue, Turn

_OPTIONS = "ABCD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a file's questions are asked and scored.

    Args:
        scorer: rule for an answer.
        max_new_tokens: most tokens of one.
        context: wraps the context.
        question: wraps a question.
        task: our name for the same ability.
    """

    scorer: str
    max_new_tokens: int
    context: str = "{context}"
    question: str = "{input}"
    task: str = ""


_JSON = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}"
_BOOK = "Read the book and answer the question.\n\n{context}"
_CODE = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from the "
    "code context in a code block wrapped by ```:\n\n{context}"
)
_CHOICE = "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is"
_PASSKEY = Form(scorer="first-integer", max_new_tokens=15, task="needles")
_REPOQA = Form(scorer="similarity", max_new_tokens=1024, task="repoqa", context=_CODE)

#: Name of a file of SCBench, without ``scbench_`` -> how it is asked and scored there (prompts after theirs, MIT).
FORMS: dict[str, Form] = {
    "kv": Form(scorer="substring", max_new_tokens=150, task="kv", context=_JSON),
    "prefix_suffix": Form(scorer="substring", max_new_tokens=150, task="prefix_suffix"),
    "vt": Form(scorer="match-all", max_new_tokens=30, task="multihop"),
    "passkey": _PASSKEY,
    "repoqa": _REPOQA,
    "mf": Form(scorer="first-number", max_new_tokens=5, task="mf"),
    "many_shot": Form(scorer="contained", max_new_tokens=10, task="manyshot"),
    "choice_eng": Form(scorer="choice", max_new_tokens=40, task="en_choice", context=_BOOK, question=_CHOICE),
    "qa_eng": Form(
        scorer="contained", max_new_tokens=40, task="en_qa", question="Question: {input}\nAnswer:",
        context="Read the book and answer the question. Be very concise in your answer.\n\n{context}",
    ),
    "qa_chn": Form(
        scorer="qa-f1-zh", max_new_tokens=40, task="zh_qa", question="问题：{input}\n答案：",
        context="阅读以下书籍然后回答问题。\n\n{context}",
    ),
    "summary": Form(scorer="rouge-l", max_new_tokens=200, task="en_sum"),
    "summary_with_needles": Form(scorer="rouge-l", max_new_tokens=800, task="mix"),
    "repoqa_and_kv": dataclasses.replace(_REPOQA, task="mix", context="{context}"),
}  # fmt: skip
#: Questions of files that mix tasks name theirs.
_PARTS: dict[str, Form] = {
    "scbench_summary": dataclasses.replace(FORMS["summary_with_needles"], task="en_sum"),
    "scbench_passkey": _PASSKEY,
    "scbench_repoqa": _REPOQA,
    "scbench_kv": dataclasses.replace(FORMS["kv"], max_new_tokens=80),
}


def read_dialogues(path: str | Path, *, turns: int | None = None, count: int | None = None) -> list[Dialogue]:
    """Read dialogues of a jsonl file.

    Args:
        path: named ``scbench_NAME.jsonl`` or ``NAME.jsonl``; another name is scored by whether the answer is contained.
        turns: most questions of a dialogue; None = all there are.
        count: most dialogues; None = all.

    Raises:
        SpecError: the file cannot be read, holds no dialogue, or a line has another form.
    """
    path = Path(path)
    form = FORMS.get(path.stem.removeprefix("scbench_"), Form(scorer="contained", max_new_tokens=40))
    found = []
    for number, line in _lines(path):
        if count is not None and len(found) >= count:
            break
        try:
            found.append(_dialogue(json.loads(line), form, path.stem, turns))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise SpecError(
                f"{path}, line {number}: {type(error).__name__} {error}. A line is "
                '{"id": ..., "context": text, "multi_turns": [{"input": text, "answer": text}, ...]}.'
            ) from None
    if not found:
        raise SpecError(f"{path} holds no dialogue. Give a jsonl file with one dialogue a line.")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"Dialogues {path} cannot be read: {error}. Give a UTF-8 jsonl file.") from None


def _dialogue(record: Mapping[str, Any], form: Form, name: str, turns: int | None) -> Dialogue:
    asked = record["multi_turns"][:turns]
    context = record["context"] if "context" in record else record["input"]
    if not asked or not isinstance(context, str):
        raise ValueError("no question, or a context that is no text")
    functions = [_text(turn["answer"]) for turn in asked if _form(turn, form).scorer == "similarity"]
    return Dialogue(
        id=str(record.get("id", name)),
        task=form.task or name,
        context=form.context.format(context=context),
        turns=tuple(_turn(turn, _form(turn, form), functions) for turn in asked),
    )


def _form(turn: Mapping[str, Any], form: Form) -> Form:
    return _PARTS.get(str(turn.get("task", "")), form)


def _turn(turn: Mapping[str, Any], form: Form, functions: list[str]) -> Turn:
    answer, options = turn["answer"], [str(option) for option in turn.get("options") or ()]
    answers = tuple(_text(one) for one in (answer if isinstance(answer, list) else [answer]))
    words = {"input": str(turn["input"])}
    target = re.search(r"The (.+) is", words["input"])
    if form.task == "mf" and target:  # a question in front of the sentence to complete
        words["input"] = f"What is the {target.group(1).lower()}?\n\n{words['input']}"
    if form.scorer == "choice":
        answers = (answers[0], _OPTIONS[options.index(answers[0])])
        words |= dict(zip(_OPTIONS, options, strict=False))
    if not answers:
        raise ValueError("a question without an answer")
    return Turn(
        question=form.question.format(**words),
        answers=answers,
        scorer=form.scorer,
        max_new_tokens=form.max_new_tokens,
        lines=True,
        task=form.task,
        rivals=tuple(one for one in functions if one != answers[0]) if form.scorer == "similarity" else (),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
