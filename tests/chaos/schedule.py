"""What happens when, drawn from a seed alone: the same seed draws the same schedule on any machine.  Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

OVERLAP = 0.3               # of the steps have two faults
CALM_S = (0.3, 1.5)         # of load before a step's first fault
BETWEEN_S = (0.0, 1.0)      # from its first fault to its second


class Group(StrEnum):
    """What a fault works on; two of different groups may overlap."""

    ENDS_DAEMON = "ends the daemon"
    DAEMON = "needs the daemon"
    ENGINE = "an engine"
    MACHINE = "the machine"


APART = ({Group.ENDS_DAEMON, Group.DAEMON},)


@dataclass(frozen=True)
class Plan:
    """`dice` decides what a fault leaves open: who is hit, how hard."""

    kind: str
    dice: int
    hold_s: float

    def random(self) -> random.Random:
        return random.Random(self.dice)


@dataclass(frozen=True)
class Step:
    number: int
    calm_s: float
    faults: tuple[Plan, ...]
    between_s: float = 0.0

    def __str__(self) -> str:
        return " + ".join(f"{one.kind}({one.dice}) for {one.hold_s:.1f} s" for one in self.faults)


@dataclass(frozen=True)
class Shape:
    """What a schedule has to know of a kind of fault."""

    group: Group
    hold_s: tuple[float, float]


def steps(seed: int, shapes: Mapping[str, Shape]) -> Iterator[Step]:
    """Endless.  Every kind comes once before any comes again."""
    dice, number = random.Random(seed), 0
    while True:
        order = sorted(shapes)
        dice.shuffle(order)
        for kind in order:
            kinds = [kind]
            if dice.random() < OVERLAP and (others := _beside(kind, shapes)):
                kinds.append(dice.choice(others))
            yield Step(number, dice.uniform(*CALM_S), tuple(plan(one, shapes[one], dice) for one in kinds),
                       dice.uniform(*BETWEEN_S))
            number += 1


def plan(kind: str, shape: Shape, dice: random.Random) -> Plan:
    return Plan(kind, dice.randrange(1 << 32), dice.uniform(*shape.hold_s))


def _beside(kind: str, shapes: Mapping[str, Shape]) -> Sequence[str]:
    group = shapes[kind].group
    return [other for other in sorted(shapes) if shapes[other].group is not group
            and not any({group, shapes[other].group} == apart for apart in APART)]
