/*
 * The first instructions of a client program. Firmware enters big-endian, in real mode, in 32 or 64 bits as the file
 * is, with its client interface in r5 and a stack of its own in r1.
 */
#ifdef __powerpc64__
    /* Firmware takes the entry of a file of 64 bits for the descriptor of a function, as the first ABI had them. */
    .section .data, "aw"
    .balign 8
    .globl _start
_start:
    .quad begin, .TOC., 0
    .text
begin:
#else
    .text
    .globl _start
_start:
#endif
    lis %r1, stack_top@ha
    addi %r1, %r1, stack_top@l
    lis %r4, client_interface@ha
    addi %r4, %r4, client_interface@l
#ifdef __powerpc64__
    std %r5, 0(%r4)
#else
    stw %r5, 0(%r4)
#endif
    b   client

/* call_firmware(block): r3 is the block of a client interface call; returns its result. */
    .globl call_firmware
call_firmware:
    lis %r4, client_interface@ha
    addi %r4, %r4, client_interface@l
#ifdef __powerpc64__
    ld  %r4, 0(%r4)
#else
    lwz %r4, 0(%r4)
#endif
    mtctr %r4
    bctr

/* call_rtas(block, base, entry): the block of an RTAS call. */
    .globl call_rtas
call_rtas:
    mtctr %r5
    bctr

    .bss
    .balign 16
client_interface:   .space 8
    .balign 4096
stack:              .space 16384 - 256
stack_top:          .space 256

    .section .note.GNU-stack, "", @progbits
