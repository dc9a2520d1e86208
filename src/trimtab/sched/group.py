"""A request on its way: its samples, what is promised to them, where they are."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice

from trimtab.sched.prefix import Span, block_hashes
from trimtab.sched.request import Request

WAITING, RUNNING, ENDED = "waiting", "running", "ended"


class Sequence:
    """One sample of a request.

    Attributes:
        id: names it to the executor, also after it was preempted.
        sample: which of the request's.
        generated: tokens sampled so far.
        total: tokens of prompt and answer so far.
        computed: of these, cached.
        reach: tokens whose bytes are promised.
        finish: why it finished; empty = it has not.
        held: whether the executor has it open.
        freed: whether the executor has been told that it has ended.
        only: the `sample` of most of its rows, built once.
    """

    __slots__ = ("computed", "finish", "freed", "generated", "group", "held", "id", "only", "reach", "sample", "total")

    def __init__(self, id: int, sample: int, group: Group) -> None:
        self.id, self.sample, self.group = id, sample, group
        self.generated: list[int] = []
        self.total, self.computed, self.reach = len(group.request.prompt), 0, 0
        self.finish, self.held, self.freed = "", False, False
        self.only = (id,)

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.group.request.max_tokens - len(self.generated)


class Group:
    """A request and its samples, which share the pages of its prompt.

    Attributes:
        key: place in the queue; smaller is served earlier.
        order: in which it came.
        state: waiting, running or ended.
        running: samples the executor runs: one until the prompt has been run, then all that have not finished.
        forked: whether samples beside the first have been opened, or need not be.
        span, base: kept prefix it continues and the tokens of it that are used.
        common: bytes of its prompt that its samples share.
        bytes: promised to it.
        slots: sequences counted against `max_running`.
        preemptions: times it was sent back.
        started: whether the executor knows it.
        paused: whether its rows are held back.
    """

    __slots__ = (
        "base",
        "bytes",
        "common",
        "forked",
        "hashes",
        "key",
        "order",
        "paused",
        "preemptions",
        "prompt",
        "reason",
        "request",
        "running",
        "samples",
        "slots",
        "span",
        "started",
        "state",
    )

    def __init__(self, request: Request, key: float, order: int, ids: Iterator[int]) -> None:
        self.request, self.key, self.order = request, key, order
        self.prompt = len(request.prompt)
        self.samples = [Sequence(next(ids), sample, self) for sample in range(request.n)]
        self.running: list[Sequence] = []
        self.state, self.reason, self.started, self.forked = WAITING, "", False, False
        self.paused = False
        self.hashes: list[bytes] = []
        self.span: Span | None = None
        self.base = self.common = self.bytes = self.slots = self.preemptions = 0

    @property
    def unfinished(self) -> list[Sequence]:
        """Samples that go on."""
        return [seq for seq in self.samples if not seq.finish]

    @property
    def output_tokens(self) -> int:
        """Sampled, of all samples together."""
        return sum(len(seq.generated) for seq in self.samples)

    @property
    def pending(self) -> int:
        """Tokens to run before its answers go on."""
        live = self.unfinished
        return self.prompt + sum(seq.total - self.prompt for seq in live)

    def goal(self, seq: Sequence) -> int:
        """Tokens to run now: all there are, but only the prompt while other samples wait to be forked."""
        return seq.total if self.forked else self.prompt

    def prefix_hashes(self, seq: Sequence, tokens: int, block_tokens: int) -> list[bytes]:
        """Hashes of the whole blocks of its first `tokens` tokens; those of the prompt are kept.

        Only one sample can go beyond the prompt.
        """
        whole = min(tokens, self.prompt) // block_tokens
        if len(self.hashes) < whole:
            prompt = self.request.prompt
            self.hashes = block_hashes(prompt, block_tokens, self.request.salt, self.hashes)
        if tokens <= self.prompt or tokens // block_tokens == whole:
            return self.hashes[:whole]
        return block_hashes(self.tokens(seq, 0, tokens), block_tokens, self.request.salt, self.hashes[:whole])

    def tokens(self, seq: Sequence, first: int, count: int) -> Tokens[int]:
        """Some tokens of prompt and answer."""
        prompt = self.request.prompt
        if first + count <= self.prompt:
            return prompt[first : first + count]
        start = max(first - self.prompt, 0)
        end = first + count - self.prompt
        return [*prompt[first:], *islice(seq.generated, start, end)]
