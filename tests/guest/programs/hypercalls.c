/* What hypercalls and RTAS answer, to right and to wrong arguments; which registers they keep. */
#include "runtime.h"

#define OUTSIDE 0x7000000000000ul

static void kept_registers(void)
{
    u64 lost = 0;
    asm volatile(
        "li 14, 0x114; li 15, 0x115; li 20, 0x120; li 29, 0x129\n"
        "li 3, 0x300\n"
        ".long 0x44000022\n"
        "xori 14, 14, 0x114; xori 15, 15, 0x115; xori 20, 20, 0x120; xori 29, 29, 0x129\n"
        "or %0, 14, 15; or %0, %0, 20; or %0, %0, 29\n"
        : "=&r"(lost)
        :
        : "r0", "r3", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "r14", "r15", "r20", "r29", "ctr", "xer",
          "cr0", "cr1", "cr5", "cr6", "cr7", "memory");
    check_is("registers-14-to-31-are-kept", lost, 0);
}

static void errors(void)
{
    check_is("unknown-hypercall", hcall(0x7f0, 0, 0, 0, 0), H_FUNCTION);
    check_is("unknown-hypercall-of-the-private-range", hcall(0xf7fc, 0, 0, 0, 0), H_FUNCTION);
    check_is("number-that-is-no-multiple-of-4", hcall(0x301, 0, 0, 0, 0), H_FUNCTION);
    check_is("terminal-that-does-not-exist", hcall(H_PUT_TERM_CHAR, 0x123, 1, 0, 0), H_PARAMETER);
    check_is("more-characters-than-a-call-takes", hcall(H_PUT_TERM_CHAR, 0, 17, 0, 0), H_PARAMETER);
    check_is("read-of-a-terminal-that-does-not-exist", hcall(H_GET_TERM_CHAR, 0x123, 0, 0, 0), H_PARAMETER);
    check_is("tce-of-a-bus-that-does-not-exist", hcall(H_PUT_TCE, 0x12345, 0, 0, 0), H_PARAMETER);
    check_is("set-mode-of-an-unknown-resource", hcall(H_SET_MODE, 0, 99, 0, 0), H_P2);
    check_is("set-mode-value-1", hcall(H_SET_MODE, 0, MODE_TRANSLATION, 1, 0), H_P3);
    check_is("set-mode-value-2", hcall(H_SET_MODE, 0, MODE_TRANSLATION, 0, 1), H_P4);
    check_is("ipi-to-a-processor-that-does-not-exist", hcall(H_IPI, 77, 5, 0, 0), H_PARAMETER);
    check_is("load-of-no-device", hcall(H_LOGICAL_CI_LOAD, 4, OUTSIDE, 0, 0), H_PARAMETER);
}

static void results(void)
{
    u64 got[6] = {0}, again[6] = {0};
    check_is("nothing-was-typed", hypercall(got, H_GET_TERM_CHAR, 0, 0, 0, 0, 0, 0), H_SUCCESS);
    check_is("no-characters", got[0], 0);
    i64 code = hypercall(got, H_RANDOM, 0, 0, 0, 0, 0, 0);
    if (code == H_FUNCTION)
        return;
    check_is("random", code, H_SUCCESS);
    hypercall(again, H_RANDOM, 0, 0, 0, 0, 0, 0);
    check("random-differs", got[0] != again[0], "is", got[0]);
}

static void rtas_calls(void)
{
    u32 nothing[1] = {0}, out[8] = {0};
    check_is("rtas-outside-memory", hcall(H_RTAS, OUTSIDE, 0, 0, 0), H_PARAMETER);
    check("rtas-unknown-service", rtas("no-such-service", nothing, 0, 0, 0) < 0, "is", 0);
    check_is("rtas-time", rtas("get-time-of-day", nothing, 0, out, 7), 0);
    check("rtas-year", out[0] >= 2020 && out[0] < 2200, "is", out[0]);
    u32 leap_day[7] = {2028, 2, 29, 23, 59, 58, 0}, no_day[7] = {2027, 2, 29, 0, 0, 0, 0};
    check_is("rtas-set-time", rtas("set-time-of-day", leap_day, 7, 0, 0), 0);
    check_is("rtas-time-that-was-set", rtas("get-time-of-day", nothing, 0, out, 7), 0);
    check("rtas-same-minute", out[0] == 2028 && (out[1] == 2 || out[1] == 3), "month", out[1]);
    check("rtas-day-that-does-not-exist", rtas("set-time-of-day", no_day, 7, 0, 0) < 0, "is", 0);
    u32 parameter[3] = {12345, 0x800000, 64};
    check("rtas-unknown-parameter", rtas("ibm,get-system-parameter", parameter, 3, 0, 0) != 0, "is", 0);
}

int program(void)
{
    kept_registers();
    errors();
    results();
    rtas_calls();
    return 0;
}
