"""Count the instructions that a compiled kernel issues per row, from the output of `nvdisasm -c`."""

from __future__ import annotations

import re
from collections import Counter

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"^(?:@!?U?P\w+\s+)?BRA\b.*`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
#: Shorter backward branches are waits, not loops.
_LOOP_MIN = 20


class MachineCodeError(Exception):
    """The machine code has an unexpected form. The message says why."""


def issued(text: str, more_blocks: int) -> Counter[str]:
    """Count the instructions of one warp for one row, by operation (`FFMA`, `LDG.E.128`, `HGMMA.64x128x16.F32`).

    The longest backward branch is the loop over rows, and the only one inside it the loop over blocks of actions. Code
    that a forward branch skips counts as issued, except for the kernel's rare path, which is the only one with
    products. So the count is an upper bound, too high by a few guarded stores.

    Args:
        text: machine code of one kernel.
        more_blocks: iterations of the loop over blocks, if the compiler left one.

    Raises:
        MachineCodeError: the code has other loops, or the rare path is not found.
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
    """Return the number of operations with one of these prefixes, or of all operations if there are none."""
    return sum(count for operation, count in found.items() if operation.startswith(starts or ("",)))


def flop(found: Counter[str], warps: int) -> int:
    """Return the tensor cores' floating-point operations, including padding, of a program with `warps` warps."""
    done = 0
    for operation, count in found.items():
        if operation.startswith("HMMA.16816"):
            done += count * warps * 2 * 16 * 8 * 16
        elif wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", operation):  # one of four warps together
            done += count * warps // 4 * 2 * int(wide[1]) * int(wide[2]) * int(wide[3])
    return done


def loaded_bytes(found: Counter[str], warps: int) -> int:
    """Return the bytes that the threads of a program load from global memory and from their stacks."""
    done = 0
    for operation, count in found.items():
        if operation.startswith(("LDG", "LDL")):
            bits = re.search(r"\.(64|128|U16|U8)\b", operation)
            width = {"64": 8, "128": 16, "U16": 2, "U8": 1}[bits[1]] if bits else 4
            done += count * warps * 32 * width
    return done
