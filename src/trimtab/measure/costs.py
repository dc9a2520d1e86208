"""What seconds cost: dollars, joules and carbon, so that times on different numbers of devices can be compared.

Sources: cost-aware variants of the idealized runtime, arXiv 2305.02440, section 3.3; carbon as HELM counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import CalibrationError, SpecError
from trimtab.spec.machine import THIS, Machine, load_machine, machine_ids

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerGrid:
    """Where the electricity comes from.

    Args:
        kg_co2eq_per_kwh: carbon intensity of the grid.
        pue: power usage effectiveness: what the data centre draws over what its computers draw.
        source: where both numbers come from, with the year.
    """

    kg_co2eq_per_kwh: float
    pue: float
    source: str

    def __post_init__(self) -> None:
        if self.kg_co2eq_per_kwh < 0 or self.pue < 1:
            raise SpecError(
                f"kg_co2eq_per_kwh={self.kg_co2eq_per_kwh:g} and pue={self.pue:g} are not possible. "
                "Allowed: an intensity of 0 or more and a PUE of 1 or more."
            )


#: Used where nobody says which grid: the PUE of HELM's training energy table, and the world's mean intensity of a year.
WORLD_2023 = PowerGrid(
    kg_co2eq_per_kwh=0.48,
    pue=1.1,
    source="world mean of 2023, 480 g CO2eq/kWh (Ember, Global Electricity Review 2024); "
    "PUE 1.1 as in HELM's helm_training_efficiency.json",
)


def carbon_kg(energy_j: float, grid: PowerGrid = WORLD_2023) -> float:
    """Kilograms of CO2 equivalent: kWh x PUE x grid intensity.

    >>> round(carbon_kg(3.6e6, PowerGrid(kg_co2eq_per_kwh=0.4, pue=1.1, source="an example")), 3)
    0.44
    """
    return energy_j / JOULES_PER_KWH * grid.pue * grid.kg_co2eq_per_kwh


def usd_per_h(machine: Machine, override: float | None = None) -> float:
    """Hourly price of one device.

    Args:
        machine: its catalogue price is used unless
        override: a price is given.

    Raises:
        SpecError: a negative price.
        CalibrationError: the machine has none; the message lists the machines that have one.
    """
    if override is not None:
        if override < 0:
            raise SpecError(f"price_usd_per_h={override:g} is not possible. Allowed: 0 or more.")
        return override
    if machine.usd_per_h is None:
        priced = [
            f"{each.id} ({each.usd_per_h:g})"
            for each in (load_machine(name) for name in machine_ids() if name != THIS)
            if each.usd_per_h is not None
        ]
        raise CalibrationError(
            f"{machine.id} has no hourly price. Give one (--price), or name a machine with a price in USD/h: {', '.join(priced)}."
        )
    return machine.usd_per_h


def idealized_usd(time_s: float, usd_per_device_h: float, devices: int = 1) -> float:
    """Dollars of a request: time x devices x price of an hour / 3600."""
    return time_s * devices * usd_per_device_h / 3600


def idealized_energy_j(time_s: float, power_w: float, devices: int = 1) -> float:
    """Joules of a request: time x devices x power (the limit of the device, or the mean that was measured)."""
    return time_s * devices * power_w


def usd_per_million_tokens(usd_per_device_h: float, tokens_per_s: float, devices: int = 1) -> float:
    """Dollars per million tokens: price of an hour x devices / (3600 x tokens/s) x 1e6.

    >>> round(usd_per_million_tokens(3.6, 100.0, devices=2), 9)
    20.0
    """
    return usd_per_device_h * devices / (3600 * tokens_per_s) * 1e6
