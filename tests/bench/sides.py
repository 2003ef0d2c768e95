"""Two sides of one measurement: the same work in turn, in one process, by CPU time of one thread; medians.

Every side is called once before, by whoever asserts that both say the same: that warms it up.
"""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Captions = list[list[int]]
"""Token ids of each caption, without prompt and end token."""


class Spent(NamedTuple):
    """CPU seconds of one call; user_s: without the kernel's, which are page faults.

    glibc gives the memory of large tensors back and asks for it again. How often follows from where they happen to lie, and
    what a fault costs from the machine.
    """

    cpu_s: float
    user_s: float


def cpu_seconds(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Spent]]:
    """Of each call; the sides in turn."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begun = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
            side()
            ended = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
            spent[name].append(Spent(ended[0] - begun[0], ended[1] - begun[1]))
    return spent


def compared(spent: Mapping[str, list[Spent]], count: int, said: Captions, **fields: Any) -> dict[str, Any]:
    """What measure() returns: `count` over the CPU seconds of "ours" and of "peer", and how diverse the captions are.

    fields: name, unit, must and aim, and what else the line tells.
    """
    return {
        "values": [round(count / each.cpu_s, 3) for each in spent["ours"]],
        "peer": round(count / statistics.median(each.cpu_s for each in spent["peer"]), 3),
        "ratio": ratio(spent, "peer"),
        "identical": True,
        **fields,
        "ratio_of_user_time": ratio(spent, "peer", "user_s"),
        "different_captions": len({tuple(ids) for ids in said}),
        "different_tokens": len({i for ids in said for i in ids}),
        "num_captions": len(said),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def ratio(spent: Mapping[str, list[Spent]], peer: str, clock: str = "cpu_s") -> float:
    """How many times as fast ours is, medians. clock: a field of Spent."""
    medians = {name: statistics.median(getattr(each, clock) for each in spent[name]) for name in (peer, "ours")}
    return round(medians[peer] / medians["ours"], 2)


def same(mine: Captions, theirs: Captions) -> Captions:
    """These captions, asserted to be those."""
    different = [(n, *both) for n, both in enumerate(zip(mine, theirs, strict=True)) if both[0] != both[1]]
    assert not different, f"{len(different)} of {len(mine)} captions differ, the first one: {different[0]}"
    return mine
