"""What the HTTP process and the engine process say to each other. Plain values, msgpack, no torch.

The conversation:

    front -> engine   Start, then any number of Submit, Embed, Cancel, Pause, Resume, Load, Unload, Drain
    engine -> front   Ready (or Stopped), then for each Submit: Admitted, Tokens..., and exactly one end:
                      Finished, Refused or Failed; for each Embed: Embedded, Refused or Failed; for each Load or
                      Unload: Loaded, Unloaded or Refused; Stats at least once a second; Stopped at last

- `id` is chosen by the front and never used twice on one connection.
- After a Cancel the engine still sends one end (Finished with what was made so far), within two steps. Messages about
  an id that has ended, or was never known, are ignored by both sides: they cross on the wire.
- Times named `at_s` are `time.monotonic()` of the engine; on Linux both processes read the same clock.
- Structs are arrays on the wire. A newer side may add fields at the end, with defaults; `PROTOCOL` changes otherwise.
- Neither side logs `prompt`, `text` or `salt`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

#: Version of this file's meaning; Start and Ready carry it, and a mismatch ends the connection.
PROTOCOL = 1

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
GrammarKind = Literal["json_schema", "regex", "lark"]
Pooling = Literal["mean", "last"]
CancelReason = Literal["disconnect", "request", "deadline", "slow_reader", "shutdown"]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of what travels alone."""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Base of what travels inside a message."""


class Sampling(Part, frozen=True, kw_only=True):
    """How a request draws its tokens; ranges are checked by the front.

    Attributes:
        max_tokens: most new tokens of each choice; 0 only with `prompt_logprobs` (scoring).
        min_tokens: end tokens and stop texts count only after this many new tokens.
        temperature: 0 is greedy; up to 2.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        repetition_penalty: above 0, 1 is off; counts prompt and answer.
        presence_penalty, frequency_penalty: -2 to 2, 0 is off; count the answer only, as OpenAI defines them.
        logit_bias: (token id, added to the logit) pairs, bias in [-100, 100]; -100 and 100 forbid and force.
        seed: of choice 0; choice i draws from seed + i. None = another text each time.
        stop: texts that end a choice and are not part of it, wherever tokens are cut.
        stop_token_ids: tokens that end a choice and are not part of its text.
        ignore_eos: go on behind end tokens (stop texts still count).
        n: choices to return, drawn from one prefill.
        best_of: choices to draw; the `n` with the largest mean log-probability are sent, whole, when all are done.
        logprobs: None = none; k = of each new token, and of the k likeliest in its place (0 = the token alone).
            Log-softmax of the raw logits, before penalties, bias, temperature and grammar.
        prompt_logprobs: the same for each prompt token but the first.
        skip_special_tokens: leave control tokens out of the text.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    best_of: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


class Grammar(Part, frozen=True):
    """What every choice must match, enforced by masks.

    Attributes:
        kind: ``json_schema`` (a JSON Schema document), ``regex`` (llguidance's dialect), ``lark`` (llguidance's Lark).
        text: its source, checked by the front with llguidance's own compiler.
    """

    kind: GrammarKind
    text: str


class ModelInfo(Part, frozen=True, kw_only=True):
    """A model id that can answer.

    Attributes:
        id: ``base`` or ``base@spec+spec``, every `auto` resolved.
        base: what was loaded before techniques, as it was asked for: the front finds the tokenizer by it.
        techniques: spec strings in order.
        context: most tokens of prompt and answer together.
        vocab_size: rows of the embedding.
        hidden_size: length of an embedding vector.
        runs: ``native`` or ``torch``.
        spec_hash: of the ModelSpec.
        weight_bytes: resident bytes that this id adds to those before it.
        asked: the id as it was asked for, where that differs (an `auto`); both ids answer.
    """

    id: str
    base: str
    techniques: tuple[str, ...]
    context: int
    vocab_size: int
    hidden_size: int
    runs: str = "native"
    spec_hash: str = ""
    weight_bytes: int = 0
    asked: str = ""


class MemoryPlan(Part, frozen=True, kw_only=True):
    """Where the memory goes, in bytes, and what fits.

    Attributes:
        weight_bytes: of all models, shared buffers once.
        kv_bytes: room for keys, values and states.
        kv_bytes_per_token: of the first model, at its context.
        kv_tokens: tokens that `kv_bytes` holds.
        workspace_bytes: activations and logits.
        available_bytes: what the machine had free at the start.
        max_sequences: rows in one step.
        full_contexts: how many sequences of full context fit `kv_bytes`.
    """

    weight_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    workspace_bytes: int = 0
    available_bytes: int = 0
    max_sequences: int = 0
    full_contexts: float = 0.0


class TokenLogprob(Part, frozen=True):
    """Log-probability (nats) of a token, and (id, log-probability) of the likeliest in its place, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Piece(Part, frozen=True, kw_only=True):
    """What one step adds to one choice.

    Attributes:
        id, choice: the request and which of its `n` answers.
        ids: new tokens, end tokens and cut-off stop texts included; may be empty when held-back text is released.
        text: text that is now certain: whole characters, no part of a stop text. Often lags behind `ids`.
        logprobs: of each of `ids`, where asked for.
        finish: why the choice ended, in its last piece.
        stopped_by: the stop text or stop token id that ended it, if one did.
    """

    id: str
    choice: int = 0
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stopped_by: str | int | None = None


# Front -> engine.


class Start(Message, frozen=True, kw_only=True):
    """First message: what to load and how much to use; `ServeConfig` has the defaults.

    Attributes:
        models: ids, the first is the default; all share their base's buffers.
        kv_bytes: room for the cache; 0 = what `max_sequences` of full context need, at most half of what is free.
        threads: of the model; 0 = all this process may use.
        isa: ``auto`` or an instruction set.
        dtype, kv_dtype: as in ``trimtab run``.
        step_ms: longest step aimed at: bounds how much prompt is mixed into decoding.
        answer_ms: a step of answers alone beyond which requests wait rather than make all slower; 0 = no limit.
        step_tokens: token budget of one step; 0 = from `step_ms` and the machine's calibration.
        max_sequences: rows of a step; 0 = as many as fit.
        max_queue, max_queue_tokens: requests and prompt tokens waiting; beyond, Refused with 429.
        max_queue_s: longest wait; beyond, Refused with 429.
        prefix_cache: keep finished prompts for reuse within a salt.
        fairness: share tokens evenly among salts.
        deterministic: an answer may not depend on what else is in the batch.
        tokenizer: folder or .gguf file whose tokenizer replaces that of every base; empty = none does.
    """

    protocol: int = PROTOCOL
    models: tuple[str, ...]
    kv_bytes: int
    threads: int
    isa: str
    dtype: str
    kv_dtype: str
    step_ms: float
    step_tokens: int
    max_sequences: int
    max_queue: int
    max_queue_tokens: int
    max_queue_s: float
    prefix_cache: bool
    fairness: bool
    deterministic: bool
    tokenizer: str
    answer_ms: float = 0.0


class Submit(Message, frozen=True, kw_only=True):
    """Generate.

    Attributes:
        id: unique name, for example ``chatcmpl-...``.
        model: an id that Ready or Loaded named.
        prompt: token ids, at least one.
        sampling: how to draw.
        grammar: what to enforce, if anything.
        salt: tenant; prefixes are shared only within equal salts. Goes into the hash of the first block.
        priority: smaller goes first; 0 is usual.
        deadline_s: seconds from now after which the request ends with finish ``deadline``; 0 = none.
    """

    id: str
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    grammar: Grammar | None = None
    salt: str = ""
    priority: int = 0
    deadline_s: float = 0.0


class Embed(Message, frozen=True, kw_only=True):
    """One vector for one text: the final norm's output, pooled over tokens, at unit length (L2)."""

    id: str
    model: str
    prompt: tuple[int, ...]
    pooling: Pooling = "mean"
    salt: str = ""
    priority: int = 0
    deadline_s: float = 0.0


class Cancel(Message, frozen=True):
    """End a request now and free what it holds; counted by reason."""

    id: str
    reason: CancelReason = "request"


class Pause(Message, frozen=True):
    """The reader is slow: give this request no more steps until Resume. What it holds may be preempted."""

    id: str


class Resume(Message, frozen=True):
    """The reader has caught up."""

    id: str


class Load(Message, frozen=True):
    """Add a model id; answered by Loaded or Refused with the same `id`."""

    id: str
    model: str


class Unload(Message, frozen=True):
    """Remove a model id once its requests have ended; answered by Unloaded or Refused."""

    id: str
    model: str


class Drain(Message, frozen=True):
    """Refuse (503) what comes now, finish what runs and waits, then send Stopped and exit 0.

    What is not done after `grace_s` seconds ends with finish ``cancelled``; 0 ends everything at once.
    """

    grace_s: float


# Engine -> front.


class Ready(Message, frozen=True, kw_only=True):
    """The engine has loaded its models and made one token with each."""

    protocol: int = PROTOCOL
    models: tuple[ModelInfo, ...]
    memory: MemoryPlan
    pid: int = 0
    load_s: float = 0.0
    deterministic: bool = False


class Admitted(Message, frozen=True, kw_only=True):
    """A request left the queue.

    Attributes:
        queued_s: how long it waited.
        cached_tokens: prompt tokens found in the prefix cache.
        predicted_first_s, predicted_s: predicted seconds from arrival to first token and to the end; None = no model.
    """

    id: str
    queued_s: float = 0.0
    cached_tokens: int = 0
    predicted_first_s: float | None = None
    predicted_s: float | None = None


class Tokens(Message, frozen=True):
    """What one step made, for all requests at once; `at_s` is when the last of it was drawn."""

    pieces: tuple[Piece, ...]
    at_s: float


class Finished(Message, frozen=True, kw_only=True):
    """The end of a request whose choices have all ended.

    Attributes:
        cached_tokens: prompt tokens that came from the prefix cache.
        completion_tokens: new tokens of all drawn choices, unsent ones of `best_of` too.
        prompt_logprobs: of each prompt token but the first, where asked for.
        preemptions: how often it lost its cache and was computed again.
        energy_j: estimate for this request; None = no model.
    """

    id: str
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    preemptions: int = 0
    queued_s: float = 0.0
    energy_j: float | None = None
    at_s: float = 0.0


class Embedded(Message, frozen=True, kw_only=True):
    """The vector of an Embed: little-endian float32 bytes."""

    id: str
    vector: bytes
    cached_tokens: int = 0
    at_s: float = 0.0


class Loaded(Message, frozen=True):
    """A model id answers from now on."""

    id: str
    model: ModelInfo


class Unloaded(Message, frozen=True):
    """A model id answers no more."""

    id: str
    model: str


class Refused(Message, frozen=True, kw_only=True):
    """The engine did not take a request, or gave it back before its first token.

    Attributes:
        status: 400 impossible as asked, 404 no such model, 413 can never fit, 429 too much waits, 503 not now.
        message: one sentence for the client: what was asked, what is allowed, what to do.
        param: the request field at fault, if one is.
        retry_after_s: predicted seconds until a new try may succeed (429, 503).
    """

    id: str
    status: int
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Failed(Message, frozen=True):
    """A request broke inside the engine (status 500); the others go on."""

    id: str
    message: str


class Stats(Message, frozen=True, kw_only=True):
    """State and counters since the start of the engine; sent at least once a second, also when idle.

    Attributes:
        step_s, predicted_step_s: steps, from their plan to their last token.
        busy_s: turns of the loop that ran a step, messages in and out included; what it is more than `pass_s` is Python.
        pass_s: passes through models, as the engine calls them.
        native_s: the part of it in the native program's own code; the rest arranges pages.
    """

    at_s: float
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    paused: int = 0
    kv_used_bytes: int = 0
    kv_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cancelled: int = 0
    steps: int = 0
    step_s: float = 0.0
    predicted_step_s: float = 0.0
    energy_j: float = 0.0
    tokens_per_s: float = 0.0
    busy_s: float = 0.0
    pass_s: float = 0.0
    native_s: float = 0.0


class Stopped(Message, frozen=True):
    """The last message: why the engine ends and with which exit code (0 drained, 1 broke, 2 could not start as asked)."""

    reason: str
    code: int = 0


ToEngine = Start | Submit | Embed | Cancel | Pause | Resume | Load | Unload | Drain
ToFront = (
    Ready | Admitted | Tokens | Finished | Embedded | Loaded | Unloaded | Refused | Failed | Stats | Stopped
)  # fmt: skip
#: Ends of a Submit or an Embed.
End = Finished | Embedded | Refused | Failed
