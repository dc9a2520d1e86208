"""What is promised to requests: bytes when they start, more as they go on, and the prefixes they share or leave behind."""

from __future__ import annotations

from trimtab.sched.config import SchedulerConfig
from trimtab.sched.group import Group, Sequence
from trimtab.sched.kv import KVBudget
from trimtab.sched.prefix import PrefixIndex, Span
from trimtab.sched.work import MarkPrefix


class Admission:
    """Promises bytes to requests and takes them back.

    Args:
        config: limits.
        kv: bytes.
        index: kept prefixes.

    Attributes:
        query_tokens, hit_tokens: of prompts looked up in the index, and found there.
    """

    def __init__(self, config: SchedulerConfig, kv: KVBudget, index: PrefixIndex) -> None:
        self.config, self.kv, self.index = config, kv, index
        self.query_tokens = self.hit_tokens = 0

    def protected(self, group: Group) -> bool:
        """Whether all its bytes are promised when it starts, so that it is never sent back again."""
        return group.preemptions >= self.config.max_preemptions or self.config.reserve_tokens is None

    def start(self, group: Group, release: list[int]) -> bool:
        """Promise the bytes a request starts with, from the longest kept prefix on; False where they do not fit.

        Args:
            group: a request that waits.
            release: is told the marks of prefixes that go for it.
        """
        kv, config, live = self.kv, self.config, group.unfinished
        first, several = live[0], len(live) > 1
        most = config.reserve_tokens
        whole = most is None or self.protected(group)
        reaches = [seq.total + (seq.left if whole or most is None else min(seq.left, most)) for seq in live]
        common = kv.shared(group.prompt // config.block_tokens * config.block_tokens) if several else 0
        size = kv.samples(common, reaches)
        goal = group.prompt if several else first.total
        look = config.prefix_cache and group.request.reuse
        # The last token is always run, for its logits.
        hit = self.index.find(group.prefix_hashes(first, goal - 1, config.block_tokens), goal - 1) if look else None
        # A kept prefix can be larger than what is used of it: then the request may fit only without it.
        for span, base in [hit, (None, 0)] if hit else [(None, 0)]:
            if span is not None:
                self.index.pin(span)
            need = size - kv.shared(base)
            if self.index.make_room(need, release):
                break
            if span is not None:
                self.index.unpin(span)
        else:
            return False
        kv.used += need
        group.bytes, group.common, group.span, group.base = need, common, span, base
        group.slots, group.forked = len(live), not several
        for seq, reach in zip(live, reaches, strict=True):
            seq.reach, seq.computed = reach, 0
        first.computed = base
        if look:
            self.query_tokens += goal
            self.hit_tokens += base
        return True

    def grow(self, seq: Sequence, release: list[int]) -> bool:
        """Promise bytes for the next token of a sequence, and for some more if there is room."""
        most = seq.total + seq.left
        for reach in (min(seq.total + self.config.grow_tokens - 1, most), seq.total):
            more = self.kv.nbytes(reach) - self.kv.nbytes(seq.reach)
            if self.index.make_room(more, release):
                self.kv.used += more
                seq.group.bytes += more
                seq.reach = reach
                return True
        return False

    def drop_sample(self, seq: Sequence) -> None:
        """Take back the bytes of one sample while others of its request go on."""
        own = self.kv.nbytes(seq.reach) - seq.group.common
        self.kv.used -= own
        seq.group.bytes -= own
        seq.group.slots -= 1
        seq.held = False

    def let_go(self, group: Group) -> None:
        """Take back everything of a request."""
        self.kv.used -= group.bytes
        group.bytes = group.slots = group.base = 0
        if group.span is not None:
            self.index.unpin(group.span)
            group.span = None
        group.running = []
        for seq in group.samples:
            seq.held, seq.computed = False, 0

    def mark_prompt(self, group: Group) -> MarkPrefix | None:
        """Keep the prompt of a request that runs, as far as it has been run; its bytes pass to the index."""
        seq = group.running[0]
        tokens = self._blocks(seq, min(seq.computed, group.prompt))
        if tokens <= group.base:
            return None
        size, shared = self.kv.nbytes(tokens), self.kv.shared(tokens)
        more = size - shared  # what both hold of it, once the sequence writes on
        if self.kv.free < more:
            return None
        span = self._keep(group, seq, tokens, size - self.kv.shared(group.base))
        if span is None:
            return None
        self.kv.used += more
        group.bytes -= shared - self.kv.shared(group.base)
        self.index.pin(span)
        if group.span is not None:
            self.index.unpin(group.span)
        group.span, group.base = span, tokens
        return MarkPrefix(span.mark, seq.id, tokens)

    def mark_answer(self, group: Group) -> MarkPrefix | None:
        """Keep prompt and answer of a finished request, just before `let_go`: the next turn of a talk begins with them."""
        seq = group.samples[0]
        tokens = self._blocks(seq, seq.computed)
        if len(group.samples) > 1 or tokens <= group.base or seq.finish == "error":
            return None
        size = self.kv.nbytes(tokens) - self.kv.shared(group.base)
        span = self._keep(group, seq, tokens, size)
        if span is None:
            return None
        self.kv.used += size  # no more than `let_go` gives back
        return MarkPrefix(span.mark, seq.id, tokens)

    def row_tokens(self, group: Group, first: int, count: int) -> int:
        """Let a row of a prompt end with a block, where prefixes can be marked only at the end of a row."""
        config = self.config
        if config.rewindable or not config.prefix_cache or not count:
            return count
        block = config.block_tokens
        end = min(first + count, (group.prompt - 1) // block * block) // block * block
        return end - first if end > first else count

    def markable(self, group: Group, done: int) -> bool:
        """Whether the next step should see to the prefix or the samples of a request whose prompt has got so far."""
        return done >= group.prompt or not (self.config.rewindable or done % self.config.block_tokens)

    def _keep(self, group: Group, seq: Sequence, tokens: int, size: int) -> Span | None:
        hashes = group.prefix_hashes(seq, tokens, self.config.block_tokens)
        return None if self.index.holds(hashes[-1]) else self.index.add(hashes, tokens, group.span, size)

    def _blocks(self, seq: Sequence, tokens: int) -> int:
        """Tokens of the whole blocks that can be marked now; 0 = none."""
        config = self.config
        whole = tokens // config.block_tokens * config.block_tokens
        return whole if config.prefix_cache and (config.rewindable or whole == seq.computed) else 0
