/* Time base and decrementer. */
#include "runtime.h"

#define SECOND 512000000ul

static u64 time_base(void)
{
    return mfspr(SPR_TB);
}

static void allow(u64 ticks)
{
    u64 end = time_base() + ticks;
    mtmsrd(mfmsr() | MSR_EE);
    while (time_base() < end)
        ;
    mtmsrd(mfmsr() & ~MSR_EE);
}

static void time_base_runs(void)
{
    u64 last = time_base();
    int backwards = 0;
    for (u32 n = 0; n < 10000; n++) {
        u64 now = time_base();
        backwards += now < last;
        last = now;
    }
    check_is("time-base-never-runs-back", backwards, 0);
    u64 start = time_base();
    while (time_base() == start)
        ;
    check("time-base-runs", time_base() > start, "is", time_base());
    u64 upper;
    asm volatile("mfspr %0, 269" : "=r"(upper));
    check_is("upper-half", (u32)upper, time_base() >> 32);
    check_is("frequency", tree_word("/cpus", "timebase-frequency", SECOND), SECOND);
}

static void decrementer_counts(void)
{
    mtspr(SPR_DEC, 0x10000000);
    u64 first = mfspr(SPR_DEC), start = time_base();
    while (time_base() < start + 5000)
        ;
    u64 second = mfspr(SPR_DEC);
    check("decrementer-counts-down", second < first, "is", second);
    check("decrementer-keeps-pace", first - second >= 4000, "counted", first - second);
}

static void decrementer_fires(void)
{
    u64 before = taken[0x900 >> 5], start = time_base();
    mtspr(SPR_DEC, 100000);
    mtmsrd(mfmsr() | MSR_EE);
    while (taken[0x900 >> 5] == before && time_base() < start + SECOND)
        ;
    u64 took = time_base() - start;
    mtmsrd(mfmsr() & ~MSR_EE);
    check_is("fires-once", taken[0x900 >> 5], before + 1);
    check("fires-not-early", took >= 100000, "after", took);
    check("fires-in-time", took < SECOND, "after", took);
}

static void decrementer_waits_for_ee(void)
{
    u64 before = taken[0x900 >> 5], start = time_base();
    mtspr(SPR_DEC, 1000);
    while (time_base() < start + 50000)
        ;
    check_is("masked-by-ee", taken[0x900 >> 5], before);
    allow(50000);
    check_is("pending-until-ee", taken[0x900 >> 5], before + 1);
    before = taken[0x900 >> 5];
    mtspr(SPR_DEC, -1ul);
    allow(50000);
    check_is("negative-fires-at-once", taken[0x900 >> 5], before + 1);
    before = taken[0x900 >> 5];
    mtspr(SPR_DEC, 1000);
    mtspr(SPR_DEC, 0x7fffffff);
    allow(50000);
    check_is("set-again-does-not-fire", taken[0x900 >> 5], before);
}

static void cede(void)
{
    u64 before = taken[0x900 >> 5], start = time_base();
    mtspr(SPR_DEC, 200000);
    check_is("cede", hcall(H_CEDE, 0, 0, 0, 0), H_SUCCESS);
    u64 took = time_base() - start;
    mtmsrd(mfmsr() & ~MSR_EE);
    check("cede-lasts-until-the-decrementer", took >= 190000, "took", took);
    check_is("cede-enables-and-the-interrupt-comes", taken[0x900 >> 5], before + 1);
    hcall(H_CPPR, 0xff, 0, 0, 0);
    mtspr(SPR_DEC, 0x7fffffff);
    u64 results[6], external = taken[0x500 >> 5];
    hcall(H_IPI, 0, 5, 0, 0);
    check_is("cede-with-a-waiting-interrupt", hcall(H_CEDE, 0, 0, 0, 0), H_SUCCESS);
    mtmsrd(mfmsr() & ~MSR_EE);
    check_is("the-interrupt-comes", taken[0x500 >> 5], external + 1);
    hypercall(results, H_XIRR, 0, 0, 0, 0, 0, 0);
    hcall(H_IPI, 0, 0xff, 0, 0);
    hcall(H_EOI, results[0], 0, 0, 0);
}

/* A prod ends the next wait before it begins, and is used up by it. */
static void prod_and_confer(void)
{
    u64 start = time_base();
    mtspr(SPR_DEC, 200000);
    check_is("prod-of-the-caller", hcall(H_PROD, 0, 0, 0, 0), H_SUCCESS);
    check_is("confer-to-itself-after-a-prod", hcall(H_CONFER, 0, 0, 0, 0), H_SUCCESS);
    check_is("confer-to-all-others", hcall(H_CONFER, -1, 0, 0, 0), H_SUCCESS);
    check_is("confer-to-nobody", hcall(H_CONFER, 7, 0, 0, 0), H_PARAMETER);
    check_is("prod-of-nobody", hcall(H_PROD, 7, 0, 0, 0), H_PARAMETER);
    check_is("cede-without-a-prod", hcall(H_CEDE, 0, 0, 0, 0), H_SUCCESS);
    mtmsrd(mfmsr() & ~MSR_EE);
    check("cede-waits-for-the-decrementer", time_base() - start >= 190000, "took", time_base() - start);
}

int program(void)
{
    time_base_runs();
    decrementer_counts();
    decrementer_fires();
    decrementer_waits_for_ee();
    /* Before there are external interrupts: in a secure VM their line may fall later than H_EOI returns. */
    prod_and_confer();
    cede();
    return 0;
}
