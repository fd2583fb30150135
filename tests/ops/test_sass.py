"""Counting of instructions in machine code."""

import pytest

from scripts.benchmark import sass

# Preamble; a loop over rounds around one over samples (two corner loads); alternatives of 2 and 1 instructions.
CODE = """
S2R R0, SR_TID.X
@P0 BRA 0x50
IADD3 R1, R1, R2, RZ
IADD3 R1, R1, R2, RZ
BRA 0x60
MOV R1, RZ
STS.128 [R2], R4
LDG.E.128.CONSTANT R4, desc[UR6][R8.64]
LDG.E.128.CONSTANT R8, desc[UR6][R8.64]
@!P1 BRA 0x70
@!P2 BRA 0x60
EXIT
"""


def code() -> list[tuple[int, str]]:
    return [(16 * i, text) for i, text in enumerate(CODE.strip().split("\n"))]


def test_instructions_count_once_per_pass_of_their_loops():
    assert sass.loops(code()) == [(0x70, 0x90), (0x60, 0xA0)]
    kernel = sass.Kernel("forward", "", block=256, lanes=8)
    once, per_round, per_sample = 6, 2, 3  # without the shorter alternative, MOV
    expected = once + 2 * per_round + 12 * per_sample
    assert sass.per_sample(code(), kernel) == pytest.approx(expected / 12 / 4)


def test_of_two_alternatives_the_shorter_is_left_out():
    assert sass.alternatives(code()) == {0x50}


def test_machine_code_without_a_loop_over_samples_is_refused():
    kernel = sass.Kernel("forward", "the_kernel", block=256, lanes=8)
    with pytest.raises(ValueError, match="the_kernel has no loop over samples"):
        sass.per_sample(code()[:7], kernel)


@pytest.mark.parametrize(
    ("registers", "block", "share"), [(32, 256, 1.0), (48, 256, 0.625), (64, 256, 0.5), (65, 256, 0.375)]
)
def test_occupancy(registers, block, share):
    assert sass.occupancy(registers, block, "90") == share


REPORT = """ptxas info : Compiling entry function 'forward_kernelIff' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info : Used 48 registers
ptxas info : Compiling entry function 'backward_kernelIff' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info : Used 64 registers
"""


def test_registers_and_spills_are_those_of_the_kernel():
    assert sass.resources(REPORT, "forward_kernelIff") == (48, 16)
    assert sass.resources(REPORT, "backward_kernelIff") == (64, 0)
    with pytest.raises(SystemExit, match="no kernel ordered"):
        sass.resources(REPORT, "ordered")
