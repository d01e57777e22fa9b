"""The count of what a kernel issues, on a listing short enough to count by hand."""

from __future__ import annotations

import pytest

from bench.engines.machine_code import MachineCodeError, flop, issued, loaded_bytes, total


def listing(*lines: str) -> str:
    """Number what is no label as `nvdisasm -c` does."""
    return "\n".join(
        line if line.startswith(".") else f"        /*{at:04x}*/  {line} ;" for at, line in enumerate(lines)
    )


def loop(label: str, *body: str) -> tuple[str, ...]:
    return (f"{label}:", *body, f"@P0 BRA `({label})")


RARE = ("@P2 BRA `(.L_x_9)", "HMMA.16816.F32.BF16 R0, R4, R8, RZ", ".L_x_9:")
BLOCKS = loop(".L_x_2", *["FADD R0, R1, R2"] * 19, "LDL.64 R4, [R1]", "BAR.SYNC.DEFER_BLOCKING 0x0")
ROWS = loop(
    ".L_x_1", *["FFMA R0, R1, R2, R3"] * 3, *RARE, *BLOCKS, "@P1 BRA `(.L_x_3)", "STS [R1], R0", ".L_x_3:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", "LDG.E.128 R4, desc[UR4][R2.64]",
)  # fmt: skip


def test_a_row_is_its_loop_once_the_blocks_so_often_and_the_rare_path_never():
    found = issued(listing("S2R R0, SR_TID.X", *ROWS, "EXIT"), more_blocks=3)
    assert found["FFMA"] == 3
    assert found["FADD"] == 3 * 19
    assert total(found, "BAR") == 3
    assert total(found, "HMMA", "S2R", "EXIT") == 0
    assert found["STS"] == 1, "a guarded store counts as issued"
    assert total(found) == 3 + 1 + 3 * 22 + 1 + 1 + 2 + 1


def test_products_and_loads_are_counted_for_the_whole_program():
    found = issued(listing(*ROWS), more_blocks=1)
    assert flop(found, warps=8) == 2 * 2 * 64 * 128 * 16
    assert loaded_bytes(found, warps=8) == 8 * 32 * (16 + 8)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("FADD R0, R1, R2", "EXIT"), "at most one within it, found 0"),
        (loop(".L_x_1", *["FADD R0, R1, R2"] * 30), "no branch skips"),
    ],
)
def test_machine_code_of_another_form_is_refused(lines, why):
    with pytest.raises(MachineCodeError, match=why):
        issued(listing(*lines), 1)
