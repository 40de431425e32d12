"""Machine code is read right: the main loop, what is spilled in and outside it, and the widths of stores."""

from bench.sass import Code

# A loop over blocks around a loop that multiplies, as the compiler writes them; a loop that ends in another kernel's
# trap; and predicates, modifiers and labels of every kind.
CODE = """
	.section	.text._walk_kernel,"ax",@progbits
.text._walk_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL.64 [R1], R4 ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   LDL.LU R7, [R1+0x8] ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64] ;
        /*0050*/              @!P1 LDL R9, [R1+0x10] ;
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
        /*0090*/                   MUFU.EX2 R5, R6 ;
        /*00a0*/               @P2 STG.E.128 desc[UR4][R2.64], R8 ;
        /*00b0*/             @!UP0 STG.E.U16 desc[UR4][R2.64], R8 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""


def test_the_main_loop_is_the_inner_one_that_multiplies() -> None:
    """Not the loop over blocks around it, and not the endless loop behind the kernel."""
    code = Code.parse(CODE)
    assert [i.name for i in code.instructions[code.main_loop.start : code.main_loop.stop]] == [
        "LDGSTS", "LDL", "WARPGROUP", "HGMMA", "BRA"
    ]  # fmt: skip
    assert len(code.loops()) == 3
    assert code.count_outside() == 17 - 5


def test_spills_are_told_apart() -> None:
    """In the loop every load counts; outside it the larger of what is stored and loaded."""
    code = Code.parse(CODE)
    assert code.spilled(inside=True) == 4
    assert code.spilled(inside=False) == 8


def test_widths_and_shapes() -> None:
    """Stores are counted by width in bits, predicated ones too; products have the shape that their name says."""
    code = Code.parse(CODE)
    assert code.widths("STG") == {128: 1, 32: 1, 16: 1}
    assert code.widths("LDGSTS") == {128: 1}
    assert code.product_shapes() == ["64×256×16"]
    assert Code.parse("/*0000*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;").product_shapes() == ["16×8×16"]


def test_code_without_products_has_no_main_loop() -> None:
    """All of it is then outside."""
    code = Code.parse(CODE.replace("HGMMA", "FFMA"))
    assert len(code.main_loop) == 0
    assert code.spilled(inside=True) == 0
    assert code.spilled(inside=False) == 8
