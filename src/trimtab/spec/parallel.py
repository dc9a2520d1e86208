"""Over how many devices a model is spread, and how."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Degrees of parallelism; their product (without `ep`) is the number of devices.

    Args:
        tp: tensor parallel: every matrix is cut over `tp` devices of one node.
        pp: pipeline parallel: the layers are cut into `pp` stages.
        dp: replicas that share the requests.
        ep: devices the experts of a layer are spread over: a divisor of tp (every device sees the same tokens), or tp * dp
            (the replicas exchange tokens).

    Raises:
        SpecError: a degree below 1, or an `ep` that does not fit.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}={value!r} is not possible. Allowed: a whole number of 1 or more.")
        if self.tp % self.ep and self.ep != self.tp * self.dp:
            allowed = sorted({d for d in range(1, self.tp + 1) if self.tp % d == 0} | {self.tp * self.dp})
            raise SpecError(f"ep={self.ep} does not fit tp={self.tp}, dp={self.dp}. Allowed: {allowed}.")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.tp * self.pp * self.dp

    @property
    def exchange(self) -> bool:
        """True if replicas exchange tokens with each other's experts."""
        return self.ep > self.tp

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp, "ep": self.ep}

    def __str__(self) -> str:
        parts = [f"{name}{value}" for name, value in self.to_dict().items() if value > 1]
        return " ".join(parts) or "one device"


ALONE = Parallel()
