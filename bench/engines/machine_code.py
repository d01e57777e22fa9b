"""What a compiled kernel issues for one row, read off its machine code as `nvdisasm -c` prints it."""

from __future__ import annotations

import re
from collections import Counter

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"^(?:@!?U?P\w+\s+)?BRA\b.*`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
#: Backward branches over less are waits, not loops over work.
_LOOP_MIN = 20


class MachineCodeError(Exception):
    """The machine code is not of the form that this reader knows; the message says why."""


def issued(text: str, more_blocks: int) -> Counter[str]:
    """Count what one warp issues for one row, by operation (`FFMA`, `LDG.E.128`, `HGMMA.64x128x16.F32`).

    The longest backward branch is the loop over rows, the only one within it the loop over blocks of actions. What a
    forward branch skips counts as issued, but for the kernel's one rare path: the only one with products in it. So the
    count is an upper bound, by a few guarded stores.

    Args:
        text: of one kernel.
        more_blocks: how often the loop over blocks runs, if the compiler left one.

    Raises:
        MachineCodeError: there are other loops than these, or the rare path is not where it is looked for.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    jumps = [(at, labels[to[1]]) for at, code in enumerate(instructions) if (to := _BRANCH.match(code))]
    loops = sorted(((to, at) for at, to in jumps if at - to >= _LOOP_MIN), key=lambda loop: loop[0] - loop[1])
    if not 1 <= len(loops) <= 2:
        raise MachineCodeError(f"expected a loop over rows and at most one within it, found {len(loops)}")
    runs = [0] * len(instructions)
    for (first, last), count in zip(loops, (1, more_blocks), strict=False):
        runs[first : last + 1] = [count] * (last + 1 - first)
    rare = [(at + 1, to) for at, to in jumps if any("MMA" in code for code in instructions[at + 1 : to])]
    if not rare:
        raise MachineCodeError("no branch skips the rare path's products")
    for first, end in rare:
        runs[first:end] = [0] * (end - first)
    found: Counter[str] = Counter()
    for code, count in zip(instructions, runs, strict=True):
        if count:
            found[_GUARD.sub("", code).split()[0]] += count
    return found


def total(found: Counter[str], *starts: str) -> int:
    """Return how many of the operations begin with one of these; all without any."""
    return sum(count for operation, count in found.items() if operation.startswith(starts or ("",)))


def flop(found: Counter[str], warps: int) -> int:
    """Return the tensor cores' floating-point operations, padding included, of a program of so many warps."""
    done = 0
    for operation, count in found.items():
        if operation.startswith("HMMA.16816"):
            done += count * warps * 2 * 16 * 8 * 16
        elif wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", operation):  # one of four warps together
            done += count * warps // 4 * 2 * int(wide[1]) * int(wide[2]) * int(wide[3])
    return done


def loaded_bytes(found: Counter[str], warps: int) -> int:
    """Return what the program's threads load from global memory and from their stacks."""
    done = 0
    for operation, count in found.items():
        if operation.startswith(("LDG", "LDL")):
            bits = re.search(r"\.(64|128|U16|U8)\b", operation)
            width = {"64": 8, "128": 16, "U16": 2, "U8": 1}[bits[1]] if bits else 4
            done += count * warps * 32 * width
    return done
