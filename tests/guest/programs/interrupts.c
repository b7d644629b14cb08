/* Every interrupt that a guest takes: its vector, where it says it happened, and why. */
#include "runtime.h"

enum { TRAP = 0x20000, PRIVILEGED = 0x40000, ILLEGAL = 0x80000, PROGRAM_KIND = 0x1e0000 };
enum { NOT_FOUND = 0x40000000, PROTECTED = 0x08000000, STORE = 0x02000000 };
#define UNMAPPED 0x3000000000ul
#define NO_QUADRANT 0x4000000000000000ul
#define FSCR_DSCR (1ul << 2)
#define FSCR_TAR (1ul << 8)
#define FSCR_SCV (1ul << 12)

static void expect(const char *name, u64 vector, u64 srr0)
{
    if (check(name, trapped.vector == vector, "vector", trapped.vector) && srr0)
        check_is("  its address", trapped.srr0, srr0);
}

static void program_kinds(void)
{
    try(do_trap, 0, 0);
    expect("trap-0x700", 0x700, (u64)at_trap);
    check_is("trap-kind", trapped.srr1 & PROGRAM_KIND, TRAP);
    try(do_illegal, 0, 0);
    expect("illegal-0x700", 0x700, (u64)at_illegal);
    check_is("illegal-kind", trapped.srr1 & PROGRAM_KIND, ILLEGAL);
}

static void unavailable(void)
{
    u64 off = mfmsr() & ~(MSR_FP | MSR_VEC | MSR_VSX);
    trapped.vector = 0;
    attempt(do_fadd, 0, 0, off);
    expect("fp-unavailable-0x800", 0x800, (u64)at_fadd);
    trapped.vector = 0;
    attempt(do_vadd, 0, 0, off);
    expect("vmx-unavailable-0xf20", 0xf20, (u64)at_vadd);
    trapped.vector = 0;
    attempt(do_xvadd, 0, 0, off | MSR_FP | MSR_VEC);
    expect("vsx-unavailable-0xf40", 0xf40, (u64)at_xvadd);
    trapped.vector = 0;
    attempt(do_fadd, 0, 0, off | MSR_FP);
    check("fp-available", !trapped.vector, "vector", trapped.vector);
}

static void system_call(void)
{
    try(do_sc, 0, 0);
    expect("system-call-0xc00", 0xc00, (u64)at_sc + 4);
    check_is("system-call-msr", trapped.srr1 & (MSR_PR | MSR_LE | MSR_ME), mfmsr() & (MSR_LE | MSR_ME));
}

static void alignment(void)
{
    static u64 words[4];
    u64 odd = (u64)words + 1;
    try(do_ldarx, odd, 0);
    expect("alignment-0x600", 0x600, (u64)at_ldarx);
    check_is("alignment-dar", trapped.dar, odd);
}

static void system_reset(const char *name, u64 target)
{
    try(do_hypercall, H_SIGNAL_SYS_RESET, target);
    expect(name, 0x100, (u64)at_hypercall + 4);
    check_is("system-reset-result", trapped.gpr[3], H_SUCCESS);
    check_is("system-reset-handler-in-real-mode", trapped.msr & (MSR_IR | MSR_DR | MSR_EE), 0);
}

static void system_resets(void)
{
    system_reset("system-reset-of-the-caller-0x100", 0);
    system_reset("system-reset-of-all-0x100", SYS_RESET_ALL);
    trapped.vector = 0;
    check_is("system-reset-of-others", hcall(H_SIGNAL_SYS_RESET, SYS_RESET_OTHERS, 0, 0, 0), H_SUCCESS);
    check("others-are-none", !trapped.vector, "vector", trapped.vector);
    check_is("system-reset-of-nobody", hcall(H_SIGNAL_SYS_RESET, 7, 0, 0, 0), H_PARAMETER);
}

static int wait_for(u64 vector, u64 before, u64 ticks)
{
    u64 end = mfspr(SPR_TB) + ticks;
    mtmsrd(mfmsr() | MSR_EE);
    while (taken[vector >> 5] == before && mfspr(SPR_TB) < end)
        ;
    mtmsrd(mfmsr() & ~MSR_EE);
    return taken[vector >> 5] != before;
}

static void external(void)
{
    u64 results[6] = {0}, before = taken[0x500 >> 5];
    hcall(H_CPPR, 0xff, 0, 0, 0);
    check_is("ipi-sent", hcall(H_IPI, 0, 5, 0, 0), H_SUCCESS);
    check_is("external-masked-by-ee", taken[0x500 >> 5], before);
    trapped.vector = 0;
    check("external-0x500", wait_for(0x500, before, 512000000), "taken", taken[0x500 >> 5]);
    check("external-interrupted-with-ee", (trapped.srr1 & MSR_EE) != 0, "srr1", trapped.srr1);
    check_is("xirr", hypercall(results, H_XIRR, 0, 0, 0, 0, 0, 0), H_SUCCESS);
    check_is("xirr-is-the-ipi", results[0] & 0xffffff, 2);
    check_is("ipi-taken-back", hcall(H_IPI, 0, 0xff, 0, 0), H_SUCCESS);
    check_is("eoi", hcall(H_EOI, results[0], 0, 0, 0), H_SUCCESS);
    before = taken[0x500 >> 5];
    check("external-gone", !wait_for(0x500, before, 100000), "taken", taken[0x500 >> 5]);
}

static void decrementer(void)
{
    u64 before = taken[0x900 >> 5];
    mtspr(SPR_DEC, 1000);
    check("decrementer-0x900", wait_for(0x900, before, 512000000), "taken", taken[0x900 >> 5]);
    check("decrementer-msr", (trapped.srr1 & MSR_EE) != 0, "srr1", trapped.srr1);
}

static void translation_faults(void)
{
    try(do_load, UNMAPPED + 8, 0);
    expect("load-0x300", 0x300, (u64)at_load);
    check_is("load-dar", trapped.dar, UNMAPPED + 8);
    check_is("load-dsisr", trapped.dsisr, NOT_FOUND);
    try(do_store, UNMAPPED + 16, 1);
    expect("store-0x300", 0x300, (u64)at_store);
    check_is("store-dar", trapped.dar, UNMAPPED + 16);
    check_is("store-dsisr", trapped.dsisr, NOT_FOUND | STORE);
    try(jump, UNMAPPED, 0);
    expect("fetch-0x400", 0x400, UNMAPPED);
    check_is("fetch-srr1", trapped.srr1 & NOT_FOUND, NOT_FOUND);
    try(do_load, NO_QUADRANT, 0);
    expect("segment-0x380", 0x380, (u64)at_load);
    check_is("segment-dar", trapped.dar, NO_QUADRANT);
    try(jump, NO_QUADRANT, 0);
    expect("segment-0x480", 0x480, NO_QUADRANT);
}

static void problem_state(void)
{
    try_as_user(do_nothing, 0, 0);
    check("user-runs", !trapped.vector, "vector", trapped.vector);
    try_as_user(do_mfmsr, 0, 0);
    expect("privileged-0x700", 0x700, (u64)at_mfmsr + USER_OFFSET);
    check_is("privileged-kind", trapped.srr1 & PROGRAM_KIND, PRIVILEGED);
    check("privileged-from-user", (trapped.srr1 & MSR_PR) != 0, "srr1", trapped.srr1);
    check_is("handler-is-privileged", trapped.msr & MSR_PR, 0);
    try_as_user(do_mfsrr0, 0, 0);
    expect("privileged-register-0x700", 0x700, (u64)at_mfsrr0 + USER_OFFSET);
    check_is("privileged-register-kind", trapped.srr1 & PROGRAM_KIND, PRIVILEGED);
    try_as_user(do_sc, 0, 0);
    expect("user-system-call-0xc00", 0xc00, (u64)at_sc + 4 + USER_OFFSET);
    check("user-system-call-msr", (trapped.srr1 & MSR_PR) != 0, "srr1", trapped.srr1);
    try_as_user(do_load, (u64)_start, 0);
    expect("user-load-of-privileged-0x300", 0x300, (u64)at_load + USER_OFFSET);
    check_is("user-load-dsisr", trapped.dsisr, PROTECTED);
    i64 code = try_as_user(do_hypercall, H_RANDOM, 0);
    check("user-hypercall-refused", trapped.vector == 0x700 || code == H_PRIVILEGE, "r3", code);
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) & ~FSCR_TAR);
    try_as_user(do_mttar, 0, 0);
    expect("facility-unavailable-0xf60", 0xf60, (u64)at_mttar + USER_OFFSET);
    check_is("facility-is-tar", mfspr(SPR_FSCR) >> 56, 8);
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) | FSCR_TAR);
    try_as_user(do_mttar, 0, 0);
    check("facility-available", !trapped.vector, "vector", trapped.vector);
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) & ~FSCR_DSCR);
    try_as_user(do_mtdscr, 5, 0);
    expect("dscr-unavailable-0xf60", 0xf60, (u64)at_mtdscr + USER_OFFSET);
    check_is("facility-is-dscr", mfspr(SPR_FSCR) >> 56, 2);
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) | FSCR_DSCR);
    try_as_user(do_mtdscr, 5, 0);
    check("dscr-available", !trapped.vector, "vector", trapped.vector);
    check_is("dscr-is-the-kernels", mfspr(SPR_DSCR), 5);
}

/* As a debugger of the guest steps its processes. */
static void traced(void)
{
    trapped.vector = 0;
    attempt_offset = USER_OFFSET;
    attempt((char *)do_nothing + USER_OFFSET, 0, 0, (mfmsr() & ~MSR_FP) | MSR_PR | MSR_EE | MSR_IR | MSR_DR | MSR_SE);
    attempt_offset = 0;
    expect("user-step-0xd00", 0xd00, (u64)do_nothing + 4 + USER_OFFSET);
    check("user-step-msr", (trapped.srr1 & MSR_SE) != 0, "srr1", trapped.srr1);
    check_is("step-ends-in-handler", trapped.msr & MSR_SE, 0);
}

static void vectored_calls(void)
{
    u64 msr = mfmsr();
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) | FSCR_SCV);
    try(do_scv0, 0, 0);
    check("scv0-no-interrupt", !trapped.vector, "vector", trapped.vector);
    check_is("scv0-vector", scv_result[0], 0x5c0);
    check_is("scv0-ctr-is-msr", scv_result[2] & ~0x40000000ul, msr);
    try(do_scv1, 0, 0);
    check_is("scv1-vector", scv_result[0], 0x5c1);
    check_is("scv1-lr-is-next", scv_result[1], (u64)at_scv1 + 4);
    check_is("rfscv-msr", mfmsr(), msr);
    mtspr(SPR_FSCR, mfspr(SPR_FSCR) & ~FSCR_SCV);
    try_as_user(do_scv, 0, 0);
    expect("scv-unavailable-0xf60", 0xf60, (u64)at_scv + USER_OFFSET);
    check_is("facility-is-scv", mfspr(SPR_FSCR) >> 56, 12);
}

static void with_translation(void)
{
    try(do_trap, 0, 0);
    expect("trap-translated", 0x700, (u64)at_trap);
    check_is("handler-in-real-mode", trapped.msr & (MSR_IR | MSR_DR), 0);
    check_is("interrupted-translated", trapped.srr1 & (MSR_IR | MSR_DR), MSR_IR | MSR_DR);
    check_is("ail-3", hcall(H_SET_MODE, 3, MODE_TRANSLATION, 0, 0), H_SUCCESS);
    try(do_trap, 0, 0);
    expect("trap-ail-3", 0x700, (u64)at_trap);
    check_is("handler-translated", trapped.msr & (MSR_IR | MSR_DR), MSR_IR | MSR_DR);
    system_reset("system-reset-ail-3", 0);
    try_as_user(do_sc, 0, 0);
    expect("user-system-call-ail-3", 0xc00, (u64)at_sc + 4 + USER_OFFSET);
    vectored_calls();
    mmu_off();
    try(do_trap, 0, 0);
    expect("trap-ail-3-real-mode", 0x700, (u64)at_trap);
    check_is("handler-real-when-interrupted-real", trapped.msr & (MSR_IR | MSR_DR), 0);
    check_is("ail-0", hcall(H_SET_MODE, 0, MODE_TRANSLATION, 0, 0), H_SUCCESS);
}

int program(void)
{
    program_kinds();
    unavailable();
    system_call();
    alignment();
    system_resets();
    external();
    decrementer();
    check_is("handler-endian", trapped.msr & MSR_LE, mfmsr() & MSR_LE);
    mmu_on();
    translation_faults();
    problem_state();
    traced();
    decrementer();
    external();
    with_translation();
    return 0;
}
