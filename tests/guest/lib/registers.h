/* Numbers that assembly and C share: special registers, machine state bits, layout of an interrupt's frame. */
#ifndef REGISTERS_H
#define REGISTERS_H

#define SPR_DSCR 17
#define SPR_DSISR 18
#define SPR_DAR 19
#define SPR_DEC 22
#define SPR_SRR0 26
#define SPR_SRR1 27
#define SPR_PID 48
#define SPR_FSCR 153
#define SPR_SPRG0 272
#define SPR_SPRG1 273
#define SPR_TB 268
#define SPR_PVR 287

#define FRAME_GPR(n) ((n) * 8)
#define FRAME_VECTOR 256
#define FRAME_LR 264
#define FRAME_CTR 272
#define FRAME_XER 280
#define FRAME_CR 288
#define FRAME_SRR0 296
#define FRAME_SRR1 304
#define FRAME_DAR 312
#define FRAME_DSISR 320
#define FRAME_MSR 328
#define FRAME_BYTES 384

#define RECOVERY_PC 0
#define RECOVERY_SP 8
#define RECOVERY_MSR 16

#define RETURN_MAGIC 0x7e7e

#ifdef __ASSEMBLER__
/* The program lies below 2 GiB, so 31 bits are an address. */
#define LOAD_ADDRESS(register, symbol) \
    lis register, (symbol)@ha; \
    addi register, register, (symbol)@l
#else
#define MSR_SF (1ul << 63)
#define MSR_S (1ul << 22)
#define MSR_VEC (1ul << 25)
#define MSR_VSX (1ul << 23)
#define MSR_EE (1ul << 15)
#define MSR_PR (1ul << 14)
#define MSR_FP (1ul << 13)
#define MSR_ME (1ul << 12)
#define MSR_SE (1ul << 10)
#define MSR_IR (1ul << 5)
#define MSR_DR (1ul << 4)
#define MSR_RI (1ul << 1)
#define MSR_LE (1ul << 0)
#endif
#endif
