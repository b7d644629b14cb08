/* Floating point, VMX and VSX: results to the bit, what a load takes in either byte order, state across interrupts. */
#include "runtime.h"

#define ONE 0x3ff0000000000000ul
#define TWO 0x4000000000000000ul
#define THREE 0x4008000000000000ul
#define HALF 0x3fe0000000000000ul
#define MINUS_ONE 0xbff0000000000000ul
#define INFINITY 0x7ff0000000000000ul
#define QUIET_NAN 0x7ff8000000000000ul
#define MSR_FE0 (1ul << 11)
#define MSR_FE1 (1ul << 8)

typedef struct { u64 high, low; } __attribute__((aligned(16))) vector;

#define BINARY(name, instruction) \
    static u64 name(u64 a, u64 b) \
    { \
        u64 result; \
        asm volatile("lfd 1, %1; lfd 2, %2; " instruction "; stfd 3, %0" : "=m"(result) : "m"(a), "m"(b) : "memory"); \
        return result; \
    }
BINARY(add, "fadd 3, 1, 2")
BINARY(subtract, "fsub 3, 1, 2")
BINARY(multiply, "fmul 3, 1, 2")
BINARY(divide, "fdiv 3, 1, 2")
BINARY(root, "fsqrt 3, 1")
BINARY(fused, "fmadd 3, 1, 2, 2")
BINARY(to_integer, "fctidz 3, 1")
BINARY(from_integer, "fcfid 3, 1")
BINARY(to_single, "frsp 3, 1")
BINARY(add_scalar, "xsadddp 3, 1, 2")

static void set_fpscr(u64 value)
{
    asm volatile("lfd 0, %0; mtfsf 255, 0" : : "m"(value) : "memory");
}

static u64 get_fpscr(void)
{
    u64 value;
    asm volatile("mffs 0; stfd 0, %0" : "=m"(value) : : "memory");
    return value;
}

static void scalar(void)
{
    set_fpscr(0);
    check_is("add", add(ONE, HALF), 0x3ff8000000000000);
    check_is("subtract", subtract(ONE, TWO), MINUS_ONE);
    check_is("multiply", multiply(THREE, HALF), 0x3ff8000000000000);
    check_is("divide", divide(ONE, THREE), 0x3fd5555555555555);
    check_is("square-root", root(TWO, 0), 0x3ff6a09e667f3bcd);
    check_is("fused", fused(TWO, THREE), 0x4022000000000000);
    check_is("to-integer", to_integer(0xc00e000000000000, 0), -3ul);
    check_is("from-integer", from_integer(-3ul, 0), 0xc008000000000000);
    check_is("to-single", to_single(0x3fd5555555555555, 0), 0x3fd5555560000000);
    check_is("vsx-scalar", add_scalar(ONE, ONE), TWO);
    check_is("divide-by-zero", divide(ONE, 0), INFINITY);
    check("divide-by-zero-is-noted", get_fpscr() >> 26 & 1, "fpscr", get_fpscr());
    check_is("zero-by-zero", divide(0, 0) & ~(1ul << 63), QUIET_NAN);
    check_is("denormal", multiply(0x0010000000000000, HALF), 0x0008000000000000);
}

static void rounding(void)
{
    static const u64 thirds[] = {0x3fd5555555555555, 0x3fd5555555555555, 0x3fd5555555555556, 0x3fd5555555555555};
    static const u64 minus_thirds[] = {0xbfd5555555555555, 0xbfd5555555555555, 0xbfd5555555555555, 0xbfd5555555555556};
    for (u64 mode = 0; mode < 4; mode++) {
        set_fpscr(mode);
        check_is("rounding", divide(ONE, THREE), thirds[mode]);
        check_is("rounding-negative", divide(MINUS_ONE, THREE), minus_thirds[mode]);
    }
    set_fpscr(0);
}

static void vectors(void)
{
    static vector a = {0x0000000100000002, 0x00000003ffffffff}, b = {0x0000000a0000000b, 0x0000000c00000001}, result;
    asm volatile("lvx 1, 0, %0; lvx 2, 0, %1; vadduwm 3, 1, 2; stvx 3, 0, %2" : : "r"(&a), "r"(&b), "r"(&result) : "memory");
    check_is("vmx-add-high", result.high, 0x0000000b0000000d);
    check_is("vmx-add-low", result.low, 0x0000000f00000000);
    asm volatile("lvx 1, 0, %0; lvx 2, 0, %1; vadduws 3, 1, 2; stvx 3, 0, %2" : : "r"(&a), "r"(&b), "r"(&result) : "memory");
    check_is("vmx-saturates", (u32)result.low, 0xffffffff);
    asm volatile("mfvscr 4; stvx 4, 0, %0" : : "r"(&result) : "memory");
    check_is("vmx-notes-saturation", (result.low | result.high) & 1, 1);
    asm volatile("lvx 1, 0, %0; vxor 3, 1, 1; mtvscr 3; stvx 3, 0, %1" : : "r"(&a), "r"(&result) : "memory");
    check_is("vmx-xor", result.high | result.low, 0);
    asm volatile("vspltisb 3, -3; stvx 3, 0, %0" : : "r"(&result) : "memory");
    check_is("vmx-splat", result.high & result.low, 0xfdfdfdfdfdfdfdfd);
    static vector pair = {ONE, THREE}, other = {TWO, HALF};
    asm volatile("lxvd2x 1, 0, %0; lxvd2x 2, 0, %1; xvadddp 3, 1, 2; stxvd2x 3, 0, %2" : : "r"(&pair), "r"(&other), "r"(&result) : "memory");
    check_is("vsx-add-first", result.high, THREE);
    check_is("vsx-add-second", result.low, 0x400c000000000000);
    asm volatile("lxv 34, 0(%0); stxv 34, 0(%1)" : : "r"(&pair), "r"(&result) : "memory");
    check_is("vsx-lxv-first", result.high, ONE);
    check_is("vsx-lxv-second", result.low, THREE);
    asm volatile("lxv 34, 0(%0); stvx 2, 0, %1" : : "r"(&other), "r"(&result) : "memory");
    check_is("vsx-34-is-vmx-2", result.high, TWO);
    u64 moved;
    asm volatile("mtvsrd 5, %1; mfvsrd %0, 5" : "=r"(moved) : "r"(0x123456789abcdef0));
    check_is("vsx-moves", moved, 0x123456789abcdef0);
    asm volatile("mtvsrd 5, %0; stfd 5, %1" : : "r"(0x0fedcba987654321), "m"(result) : "memory");
    check_is("vsx-5-is-fp-5", result.high, 0x0fedcba987654321);
    u64 order;
    asm volatile("lxvd2x 1, 0, %1; mfvsrd %0, 1" : "=r"(order) : "r"(&pair) : "memory");
    check_is("lxvd2x-takes-the-first-first", order, ONE);
}

static void across_interrupts(void)
{
    static vector kept = {0x1111222233334444, 0x5555666677778888}, result;
    u64 f = 0x4045000000000000, after;
    asm volatile("lfd 20, %0; lvx 20, 0, %1; lxvd2x 21, 0, %1" : : "m"(f), "r"(&kept) : "memory");
    try(do_trap, 0, 0);
    hcall(H_RANDOM, 0, 0, 0, 0);
    u64 before = taken[0x900 >> 5];
    mtspr(SPR_DEC, 100);
    mtmsrd(mfmsr() | MSR_EE);
    while (taken[0x900 >> 5] == before)
        ;
    mtmsrd(mfmsr() & ~MSR_EE);
    asm volatile("stfd 20, %0" : "=m"(after) : : "memory");
    check_is("fp-survives-interrupts", after, f);
    asm volatile("stvx 20, 0, %0" : : "r"(&result) : "memory");
    check("vmx-survives-interrupts", result.high == kept.high && result.low == kept.low, "high", result.high);
    asm volatile("stxvd2x 21, 0, %0" : : "r"(&result) : "memory");
    check("vsx-survives-interrupts", result.high == kept.high && result.low == kept.low, "high", result.high);
}

static void enabled_exception(void)
{
    u64 zero = 0, one = ONE;
    set_fpscr(1ul << 4); /* ZE */
    asm volatile("lfd 0, %0; lfd 1, %1" : : "m"(zero), "m"(one) : "memory");
    trapped.vector = 0;
    attempt(do_div, 0, 0, mfmsr() | MSR_FE0 | MSR_FE1);
    check("enabled-exception-0x700", trapped.vector == 0x700, "vector", trapped.vector);
    check_is("enabled-exception-kind", trapped.srr1 & 0x1e0000, 0x100000);
    check_is("enabled-exception-address", trapped.srr0, (u64)at_div);
    set_fpscr(0);
}

int program(void)
{
    mtmsrd(mfmsr() | MSR_FP | MSR_VEC | MSR_VSX);
    scalar();
    rounding();
    vectors();
    across_interrupts();
    enabled_exception();
    return 0;
}
