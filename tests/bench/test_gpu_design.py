"""The instruction counts behind the next kernel's predicted speed."""

from __future__ import annotations

import shutil

import pytest

from bench.engines import gpu_design
from bench.harness import BenchmarkError

LISTING = """_Z5kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDS.64 R2, [R3] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/              @!P0 FFMA R4, R4, R5, R6 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
"""


def test_a_loop_is_what_lies_between_a_backward_branch_and_its_target():
    assert gpu_design.loop_of(LISTING) == {"LDS": 1, "HMMA": 1, "FFMA": 1, "BRA": 1}


def test_a_listing_without_products_in_a_loop_is_refused():
    with pytest.raises(BenchmarkError, match="no loop with matrix products"):
        gpu_design.loop_of(LISTING.replace("HMMA", "IMMA"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's compiler, nvcc")
def test_every_loop_of_the_design_compiles_and_has_products_on_the_tensor_cores():
    loops = gpu_design.compiled()
    assert len(loops) == 5
    for loop in loops:
        assert loop.instructions["HMMA"] > 0
        assert loop.registers <= 255
        assert loop.spilled_bytes <= 256
        assert not loop.instructions["CALL"], "a slow path of division would be counted wrongly"


def test_a_machine_without_the_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BenchmarkError, match="nvcc is missing; install the CUDA toolkit 13"):
        gpu_design.compiled()
