/*
 * The first instructions of a program, interrupt vectors, and calls that C cannot make.
 *
 * The processor comes big-endian and in real mode, with the device tree in r3. A little-endian program changes over
 * first; it also takes an entry in its own byte order.
 */
#include "registers.h"

    .section .text.start, "ax"
    .globl _start
_start:
#ifdef __LITTLE_ENDIAN__
    /* The same four bytes are `tdi 0,r0,0x48`, which does nothing, to a big-endian processor. */
    b   1f
    .byte 0x48, 0x00, 0x00, 0x08    /* b .+8 */
1:  b   2f
    .byte 0x7d, 0x60, 0x00, 0xa6    /* mfmsr r11 */
    .byte 0x61, 0x6b, 0x00, 0x01    /* ori r11,r11,MSR_LE */
    .byte 0x7d, 0x7b, 0x03, 0xa6    /* mtsrr1 r11 */
    .byte 0x42, 0x9f, 0x00, 0x05    /* bcl 20,31,.+4 */
    .byte 0x7d, 0x48, 0x02, 0xa6    /* mflr r10 */
    .byte 0x39, 0x4a, 0x00, 0x10    /* addi r10,r10,16 */
    .byte 0x7d, 0x5a, 0x03, 0xa6    /* mtsrr0 r10 */
    .byte 0x4c, 0x00, 0x00, 0x24    /* rfid */
2:
#endif
    LOAD_ADDRESS(%r1, stack_top - 256)
    LOAD_ADDRESS(%r2, __toc)
    li  %r4, 0
    std %r4, 0(%r1)
    bl  runtime_main
    b   .

/* -- interrupts --------------------------------------------------------------------------------------------- */

/* Copied to 0x100 (and to 0xc000000000004100 for AIL 3): every 32 bytes one entry that tells its own vector. */
    .globl vectors, vectors_end
    .balign 32
vectors:
    .set vector, 0x100
    .rept (0x1000 - 0x100) / 0x20
    mtspr SPR_SPRG0, %r3
    li  %r3, vector
    ba  interrupt
    .balign 32
    .set vector, vector + 0x20
    .endr
vectors_end:

    .globl interrupt
interrupt:
    mtspr SPR_SPRG1, %r1
    LOAD_ADDRESS(%r1, frame)
    std %r0, FRAME_GPR(0)(%r1)
    std %r2, FRAME_GPR(2)(%r1)
    .irp n, 4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    std \n, FRAME_GPR(\n)(%r1)
    .endr
    std %r3, FRAME_VECTOR(%r1)
    mfspr %r4, SPR_SPRG0
    std %r4, FRAME_GPR(3)(%r1)
    mfspr %r4, SPR_SPRG1
    std %r4, FRAME_GPR(1)(%r1)
    mflr %r4
    std %r4, FRAME_LR(%r1)
    mfctr %r4
    std %r4, FRAME_CTR(%r1)
    mfxer %r4
    std %r4, FRAME_XER(%r1)
    mfcr %r4
    std %r4, FRAME_CR(%r1)
    mfspr %r4, SPR_SRR0
    std %r4, FRAME_SRR0(%r1)
    mfspr %r4, SPR_SRR1
    std %r4, FRAME_SRR1(%r1)
    mfspr %r4, SPR_DAR
    std %r4, FRAME_DAR(%r1)
    mfspr %r4, SPR_DSISR
    std %r4, FRAME_DSISR(%r1)
    mfmsr %r4
    std %r4, FRAME_MSR(%r1)
    mr  %r3, %r1
    LOAD_ADDRESS(%r1, interrupt_stack_top - 256)
    LOAD_ADDRESS(%r2, __toc)
    bl  handle_interrupt
    LOAD_ADDRESS(%r1, frame)
    ld  %r4, FRAME_SRR0(%r1)
    mtspr SPR_SRR0, %r4
    ld  %r4, FRAME_SRR1(%r1)
    mtspr SPR_SRR1, %r4
    ld  %r4, FRAME_LR(%r1)
    mtlr %r4
    ld  %r4, FRAME_CTR(%r1)
    mtctr %r4
    ld  %r4, FRAME_XER(%r1)
    mtxer %r4
    ld  %r4, FRAME_CR(%r1)
    mtcr %r4
    ld  %r0, FRAME_GPR(0)(%r1)
    .irp n, 2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld  \n, FRAME_GPR(\n)(%r1)
    .endr
    ld  %r1, FRAME_GPR(1)(%r1)
    rfid

/* Copied to 0xc000000000003000: `scv 0` and `scv 1`, 32 bytes each. r3 tells the level, r4 and r5 LR and CTR. */
    .globl scv_vectors, scv_vectors_end
    .balign 32
scv_vectors:
    .set level, 0
    .rept 2
    li  %r3, 0x5c0 + level
    mflr %r4
    mfctr %r5
    .long 0x4c0000a4                /* rfscv */
    .balign 32
    .set level, level + 1
    .endr
scv_vectors_end:

/* -- calls -------------------------------------------------------------------------------------------------- */

/* hypercall(results, number, a1..a6), ultracall(...): the code comes back, r4 to r9 go to `results` unless it is 0. */
    .macro CALL name, level
    .globl \name
\name:
    mflr %r0
    std %r0, 16(%r1)
    std %r31, -8(%r1)
    stdu %r1, -64(%r1)
    mr  %r31, %r3
    mr  %r3, %r4
    mr  %r4, %r5
    mr  %r5, %r6
    mr  %r6, %r7
    mr  %r7, %r8
    mr  %r8, %r9
    mr  %r9, %r10
    .long 0x44000002 | (\level << 5)
    cmpdi %r31, 0
    beq 1f
    std %r4, 0(%r31)
    std %r5, 8(%r31)
    std %r6, 16(%r31)
    std %r7, 24(%r31)
    std %r8, 32(%r31)
    std %r9, 40(%r31)
1:  addi %r1, %r1, 64
    ld  %r31, -8(%r1)
    ld  %r0, 16(%r1)
    mtlr %r0
    blr
    .endm
    CALL hypercall, 1
    CALL ultracall, 2

/*
 * attempt(function, a, b, msr): function(a, b) in the machine state `msr`. Returns what it returned; an interrupt that it
 * causes ends it, and is in `trapped`. Comes back in the state of the caller, who is privileged.
 */
    .globl attempt
attempt:
    mflr %r0
    std %r0, 16(%r1)
    stdu %r1, -256(%r1)
    .irp n, 14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    std \n, (\n * 8)-48(%r1)
    .endr
    mfcr %r0
    std %r0, 40(%r1)
    LOAD_ADDRESS(%r7, recovery)
    LOAD_ADDRESS(%r8, attempt_end)
    std %r8, RECOVERY_PC(%r7)
    std %r1, RECOVERY_SP(%r7)
    mfmsr %r8
    std %r8, RECOVERY_MSR(%r7)
    mtspr SPR_SRR0, %r3
    mtspr SPR_SRR1, %r6
    mr  %r12, %r3
    mr  %r3, %r4
    mr  %r4, %r5
    LOAD_ADDRESS(%r9, attempt_return)
    LOAD_ADDRESS(%r10, attempt_offset)
    ld  %r10, 0(%r10)
    add %r9, %r9, %r10
    mtlr %r9
    rfid
/* Problem state cannot change back by itself: it asks for it by a system call, which ends the attempt as a success. */
attempt_return:
    li  %r0, RETURN_MAGIC
    sc
    .globl attempt_end
attempt_end:
    .irp n, 14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ld  \n, (\n * 8)-48(%r1)
    .endr
    ld  %r0, 40(%r1)
    mtcr %r0
    addi %r1, %r1, 256
    ld  %r0, 16(%r1)
    mtlr %r0
    blr

/* Small functions for attempts. Each that traps has a label in front of the instruction that does. */
    .macro LEAF name, at, words:vararg
    .globl \name
\name:
    .globl \at
\at:
    \words
    blr
    .endm
    LEAF do_nothing, at_nothing, nop
    LEAF do_trap, at_trap, trap
    LEAF do_illegal, at_illegal, .long 0
    LEAF do_sc, at_sc, sc
    LEAF do_load, at_load, ld %r3, 0(%r3)
    LEAF do_load_word, at_load_word, lwz %r3, 0(%r3)
    LEAF do_store, at_store, std %r4, 0(%r3)
    LEAF do_ldarx, at_ldarx, ldarx %r3, 0, %r3
    LEAF do_fadd, at_fadd, .long 0xfc20082a          /* fadd f1,f0,f1 */
    LEAF do_vadd, at_vadd, .long 0x10200880          /* vadduwm v1,v0,v1 */
    LEAF do_xvadd, at_xvadd, .long 0xf0200b00        /* xvadddp vs1,vs0,vs1 */
    LEAF do_mttar, at_mttar, mtspr 815, %r3
    LEAF do_mtdscr, at_mtdscr, mtspr 3, %r3
    LEAF do_mfmsr, at_mfmsr, mfmsr %r3
    LEAF do_mfsrr0, at_mfsrr0, mfspr %r3, SPR_SRR0
    LEAF do_hypercall, at_hypercall, .long 0x44000022
    LEAF do_scv, at_scv, .long 0x44000001
    LEAF do_div, at_div, .long 0xfc210024            /* fdiv f1,f1,f0 */

    .globl do_scv0, do_scv1, at_scv1
do_scv0:
    mflr %r6
    .long 0x44000001
    b   scv_done
do_scv1:
    mflr %r6
at_scv1:
    .long 0x44000021
scv_done:
    LOAD_ADDRESS(%r7, scv_result)
    std %r3, 0(%r7)
    std %r4, 8(%r7)
    std %r5, 16(%r7)
    mtlr %r6
    blr

/* jump(address): executes there; what is there returns. */
    .globl jump
jump:
    mtctr %r3
    bctr

    .bss
    .balign 64
    .globl frame, recovery, scv_result, attempt_offset
frame:              .space FRAME_BYTES
recovery:           .space 24
scv_result:         .space 24
attempt_offset:     .space 8
    .balign 4096
stack:              .space 32768
stack_top:
interrupt_stack:    .space 16384
interrupt_stack_top:
