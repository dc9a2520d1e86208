"""API keys: who may use what, and how much.

The file is TOML and holds hashes, never keys:

    [[keys]]
    name = "ci"
    hash = "sha256:6b86b2..."           # of the key; `trimtab serve --new-key ci` makes both
    models = ["smollm2-135m*"]          # patterns; default: all
    requests_per_minute = 60            # 0, the default, is no limit; so are the next two
    tokens_per_minute = 100000          # prompt and answer; the answer's limit is reserved, what is unused returns
    concurrency = 8
    priority = 0                        # least number a request may ask for; smaller goes first
    admin = false                       # may call /admin

Keys are 256 random bits, so one round of SHA-256 hides them; a slow hash would only let strangers burn our processor.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from trimtab.errors import SpecError
from trimtab.serve.errors import ApiError

_Limit = Annotated[int, Meta(ge=0, le=2**40)]
_HASH = re.compile(r"sha256:[0-9a-f]{64}\Z")


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the file; see the module."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    hash: str
    models: tuple[str, ...] = ("*",)
    requests_per_minute: _Limit = 0
    tokens_per_minute: _Limit = 0
    concurrency: _Limit = 0
    priority: int = 0
    admin: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[KeyEntry, ...]


#: Who calls a server without keys: this machine only, so everything is allowed.
ANONYMOUS = KeyEntry(name="anonymous", hash="", admin=True, priority=-100)


class Tenant:
    """A key in use: its entry and what it has used.

    Args:
        entry: limits.
        clock: seconds that only go forward.
    """

    def __init__(self, entry: KeyEntry, clock: Callable[[], float] = time.monotonic) -> None:
        self.entry = entry
        self._clock = clock
        self._open = 0
        self._requests = _Bucket(entry.requests_per_minute, clock)
        self._tokens = _Bucket(entry.tokens_per_minute, clock)

    def may_use(self, model: str) -> bool:
        """Whether a pattern of the key matches the model id."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.entry.models)

    def take(self, tokens: int) -> Lease:
        """Count a request that may use up to `tokens`.

        Raises:
            ApiError: 429 with Retry-After; 400 if `tokens` can never be allowed.
        """
        entry = self.entry
        if entry.tokens_per_minute and tokens > entry.tokens_per_minute:
            raise ApiError(
                400, f"The request may use {tokens} tokens; this key is allowed {entry.tokens_per_minute} a minute. Lower max_tokens.",
                param="max_tokens", code="tokens_per_minute",
            )  # fmt: skip
        if entry.concurrency and self._open >= entry.concurrency:
            raise self._limited(
                f"{self._open} requests of this key are open, of {entry.concurrency} allowed", 1.0, "concurrency"
            )
        for bucket, amount, what in ((self._requests, 1, "requests"), (self._tokens, tokens, "tokens")):
            if (wait := bucket.wait(amount)) > 0:
                raise self._limited(f"This key is allowed {bucket.limit} {what} a minute", wait, f"{what}_per_minute")
        self._requests.take(1)
        self._tokens.take(tokens)
        self._open += 1
        return Lease(self, tokens)

    def settle(self, unused: int) -> None:
        """A request has ended."""
        self._open -= 1
        self._tokens.take(-unused)

    def _limited(self, what: str, wait: float, code: str) -> ApiError:
        return ApiError(429, f"{what}. Try again in {max(wait, 1):.0f} s.", code=code, retry_after_s=wait)


class Lease:
    """A counted request; `end` returns what it did not use, once."""

    def __init__(self, tenant: Tenant, tokens: int) -> None:
        self._tenant, self._tokens, self._ended = tenant, tokens, False

    def end(self, used: int) -> None:
        """The request has ended after `used` tokens."""
        if not self._ended:
            self._ended = True
            self._tenant.settle(max(self._tokens - used, 0))


class _Bucket:
    """A token bucket that holds a minute's worth; a limit of 0 never empties."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit, self._clock = limit, clock
        self._level, self._at = float(limit), clock()

    def wait(self, amount: int) -> float:
        """Seconds until `amount` is there."""
        self._fill()
        return 0.0 if not self.limit else max(amount - self._level, 0.0) * 60 / self.limit

    def take(self, amount: int) -> None:
        self._fill()
        self._level = min(self._level - amount, float(self.limit))

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.limit / 60, float(self.limit))
        self._at = now


class Keys:
    """All keys of a server.

    Args:
        entries: none = no keys are asked for.

    Attributes:
        anonymous: who calls where no key is asked for.
    """

    def __init__(self, entries: tuple[KeyEntry, ...] = ()) -> None:
        self._tenants = [Tenant(entry) for entry in entries]
        self.anonymous = Tenant(ANONYMOUS)

    @property
    def required(self) -> bool:
        """Whether callers must show a key."""
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key is in an Authorization header. Takes as long for a wrong key as for a right one.

        Raises:
            ApiError: 401.
        """
        if not self._tenants:
            return self.anonymous
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "This server asks for an API key. Send it as: Authorization: Bearer KEY.", code="missing_api_key"
            )
        asked = hash_key(key.strip())
        found = None
        for tenant in self._tenants:  # all of them, whichever matches
            if hmac.compare_digest(asked, tenant.entry.hash):
                found = tenant
        if found is None:
            raise ApiError(
                401, "The API key is not known here. Check it, or ask the operator for one.", code="invalid_api_key"
            )
        return found


def hash_key(key: str) -> str:
    """What the file holds of a key."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """Return a new key and its entry for the file.

    Raises:
        SpecError: a name the file would not take.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise SpecError(
            f"--new-key {name!r}: not possible. Allowed: 1 to 64 letters, digits, _ . and -. Try --new-key ci."
        )
    key = "tt-" + secrets.token_urlsafe(32)
    return key, f'[[keys]]\nname = "{name}"\nhash = "{hash_key(key)}"\n'


def read_keys(path: Path | None) -> Keys:
    """Read a key file; None = no keys.

    Raises:
        SpecError: it is missing, is no such file, or names one key twice.
    """
    if path is None:
        return Keys()
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File)
    except OSError as error:
        raise SpecError(
            f"--api-key-file {path}: {error.strerror}. Make one with: trimtab serve --new-key NAME >> {path}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise SpecError(f"--api-key-file {path}: {error}. See docs/serving.md for its form.") from None
    if not found.keys:
        raise SpecError(f"--api-key-file {path} holds no key. Add one: trimtab serve --new-key NAME >> {path}")
    for field in ("name", "hash"):
        values = [getattr(entry, field) for entry in found.keys]
        if len(set(values)) != len(values):
            raise SpecError(f"--api-key-file {path} holds the same {field} twice. Each must be there once.")
    for entry in found.keys:
        if not _HASH.match(entry.hash):
            raise SpecError(
                f"--api-key-file {path}: the hash of '{entry.name}' is not sha256: and 64 hexadecimal digits."
            )
    return Keys(found.keys)
