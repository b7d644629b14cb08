/* The runtime: terminal, report, device tree, RTAS, interrupts. */
#include "runtime.h"

u64 device_tree;
volatile struct frame trapped;
volatile u64 taken[128];
extern volatile struct { u64 pc, sp, msr; } recovery;
extern char vectors[], vectors_end[], scv_vectors[], scv_vectors_end[];

static u32 failures;

/* -- terminal ------------------------------------------------------------------------------------------------- */

static u8 pending[16];
static u32 n_pending;

static void flush(void)
{
    if (n_pending)
        hcall(H_PUT_TERM_CHAR, 0, n_pending, read_be64(pending), read_be64(pending + 8));
    n_pending = 0;
}

static void put(char character)
{
    pending[n_pending++] = character;
    if (n_pending == sizeof pending || character == '\n')
        flush();
}

void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

void put_hex(u64 value)
{
    int shift = 60;
    put_text("0x");
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

void put_line(const char *text)
{
    put_text(text);
    put('\n');
}

int check(const char *name, int holds, const char *reason, u64 value)
{
    put_text(holds ? "ok " : "not ok ");
    put_text(name);
    if (!holds) {
        failures++;
        put(' ');
        put_text(reason);
        put_text(": ");
        put_hex(value);
    }
    put('\n');
    return holds;
}

int check_is(const char *name, u64 got, u64 wanted)
{
    int holds = check(name, got == wanted, "is", got);
    if (!holds)
        note("wanted", wanted);
    return holds;
}

void note(const char *name, u64 value)
{
    put_text("# ");
    put_text(name);
    put_text(": ");
    put_hex(value);
    put('\n');
}

/* -- bytes ---------------------------------------------------------------------------------------------------- */

u32 read_be32(const void *at)
{
    const u8 *bytes = at;
    return (u32)bytes[0] << 24 | (u32)bytes[1] << 16 | (u32)bytes[2] << 8 | bytes[3];
}

u64 read_be64(const void *at)
{
    return (u64)read_be32(at) << 32 | read_be32((const u8 *)at + 4);
}

void write_be32(void *at, u32 value)
{
#ifdef __LITTLE_ENDIAN__
    value = __builtin_bswap32(value);
#endif
    *(volatile u32 *)at = value;
}

void write_be64(void *at, u64 value)
{
#ifdef __LITTLE_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    *(volatile u64 *)at = value;
}

void *memcpy(void *to, const void *from, u64 n_bytes)
{
    for (u64 n = 0; n < n_bytes; n++)
        ((volatile u8 *)to)[n] = ((const u8 *)from)[n];
    return to;
}

void *memset(void *to, int value, u64 n_bytes)
{
    for (u64 n = 0; n < n_bytes; n++)
        ((volatile u8 *)to)[n] = value;
    return to;
}

static int starts_with(const char *text, const char *start)
{
    while (*start)
        if (*text++ != *start++)
            return 0;
    return 1;
}

static u32 length(const char *text)
{
    u32 n = 0;
    while (text[n])
        n++;
    return n;
}

/* -- device tree (Devicetree Specification, chapter 5) ---------------------------------------------------------- */

enum { FDT_BEGIN = 1, FDT_END_NODE = 2, FDT_PROPERTY = 3, FDT_END = 9 };

const u8 *tree_property(const char *path, const char *name, u32 *n_bytes)
{
    const u8 *tree = (const u8 *)device_tree;
    const u8 *at = tree + read_be32(tree + 8);
    const char *names = (const char *)tree + read_be32(tree + 12);
    /* How deep the node is, how deep the path leads to it, and what is left of the path at each depth on the way. */
    u32 depth = 0, on_path = 0;
    const char *left[8] = {0, path};
    for (;;) {
        u32 token = read_be32(at);
        at += 4;
        if (token == FDT_BEGIN) {
            const char *node = (const char *)at;
            u32 n = length(node);
            const char *wanted = left[on_path];
            if (depth == 0)
                on_path = 1;
            else if (on_path == depth && *wanted && starts_with(wanted + 1, node) && (!wanted[1 + n] || wanted[1 + n] == '/'))
                left[++on_path] = wanted + 1 + n;
            depth++;
            at += (n + 4) & ~3u;
        } else if (token == FDT_END_NODE) {
            if (on_path == depth)
                on_path--;
            depth--;
        } else if (token == FDT_PROPERTY) {
            u32 size = read_be32(at);
            const char *own = names + read_be32(at + 4);
            if (on_path == depth && !*left[depth] && starts_with(own, name) && !own[length(name)]) {
                if (n_bytes)
                    *n_bytes = size;
                return at + 8;
            }
            at += 8 + ((size + 3) & ~3u);
        } else if (token == FDT_END) {
            return 0;
        }
    }
}

u32 tree_word(const char *path, const char *name, u32 otherwise)
{
    const u8 *value = tree_property(path, name, 0);
    return value ? read_be32(value) : otherwise;
}

int has_argument(const char *word)
{
    const char *text = (const char *)tree_property("/chosen", "bootargs", 0);
    while (text && *text) {
        if (starts_with(text, word) && (text[length(word)] == ' ' || !text[length(word)]))
            return 1;
        while (*text && *text != ' ')
            text++;
        while (*text == ' ')
            text++;
    }
    return 0;
}

/* -- RTAS ------------------------------------------------------------------------------------------------------- */

i64 rtas(const char *service, const u32 *args, u32 n_args, u32 *results, u32 n_results)
{
    static u32 block[16] __attribute__((aligned(64)));
    u32 token = tree_word("/rtas", service, 0);
    write_be32(&block[0], token);
    write_be32(&block[1], n_args);
    write_be32(&block[2], 1 + n_results);
    for (u32 n = 0; n < n_args; n++)
        write_be32(&block[3 + n], args[n]);
    i64 code = hcall(H_RTAS, (u64)block, 0, 0, 0);
    if (code)
        return code;
    for (u32 n = 0; results && n < n_results; n++)
        results[n] = read_be32(&block[4 + n_args + n]);
    return (int)read_be32(&block[3 + n_args]);
}

void finish(u32 status)
{
    u32 nothing[2] = {0, 0};
    flush();
    if (tree_property("/rtas", "pefbox,exit", 0))
        rtas("pefbox,exit", &status, 1, 0, 0);
    else
        /* Another machine than pefbox's cannot be told a status. */
        rtas("power-off", nothing, 2, 0, 0);
    for (;;)
        hcall(H_CEDE, 0, 0, 0, 0);
}

/* -- interrupts ------------------------------------------------------------------------------------------------- */

static int is_asynchronous(u64 vector)
{
    return vector == 0x500 || vector == 0x900;
}

void handle_interrupt(struct frame *frame)
{
    taken[frame->vector >> 5]++;
    if (is_asynchronous(frame->vector)) {
        memcpy((void *)&trapped, frame, sizeof *frame);
        if (frame->vector == 0x900)
            mtspr(SPR_DEC, 0x7fffffff);
        else
            /* The line stays up until the source is asked: whoever waits does that with EE off. */
            frame->srr1 &= ~MSR_EE;
        return;
    }
    if (!recovery.pc) {
        put_text("not ok unexpected-interrupt ");
        put_hex(frame->vector);
        put('\n');
        note("srr0", frame->srr0);
        note("srr1", frame->srr1);
        note("dar", frame->dar);
        note("dsisr", frame->dsisr);
        finish(100);
    }
    if (frame->vector != 0xc00 || frame->gpr[0] != RETURN_MAGIC)
        memcpy((void *)&trapped, frame, sizeof *frame);
    else
        taken[frame->vector >> 5]--;
    frame->srr0 = recovery.pc;
    frame->srr1 = recovery.msr;
    frame->gpr[1] = recovery.sp;
    recovery.pc = 0;
}

u64 try_as_user(void *function, u64 a, u64 b)
{
    trapped.vector = 0;
    attempt_offset = USER_OFFSET;
    u64 result = attempt((char *)function + USER_OFFSET, a, b, (mfmsr() & ~MSR_FP) | MSR_PR | MSR_EE | MSR_IR | MSR_DR);
    attempt_offset = 0;
    return result;
}

u64 try(void *function, u64 a, u64 b)
{
    trapped.vector = 0;
    return attempt(function, a, b, mfmsr());
}

/* -- start ------------------------------------------------------------------------------------------------------ */

static void flush_code(u64 start, u64 end)
{
    for (u64 at = start & ~127ul; at < end; at += 128)
        asm volatile("dcbst 0, %0; sync; icbi 0, %0" : : "r"(at) : "memory");
    barrier();
}

void runtime_main(u64 tree)
{
    device_tree = tree;
    memcpy((void *)0x100, vectors, vectors_end - vectors);
    memcpy((void *)0x4100, vectors, vectors_end - vectors);
    memcpy((void *)0x3000, scv_vectors, scv_vectors_end - scv_vectors);
    flush_code(0x100, 0x6000);
    mtspr(SPR_DEC, 0x7fffffff);
#ifdef __LITTLE_ENDIAN__
    i64 code = hcall(H_SET_MODE, 1, MODE_LITTLE_ENDIAN, 0, 0);
    if (code) {
        note("H_SET_MODE", code);
        finish(101);
    }
#endif
    mtmsrd(mfmsr() | MSR_SF | MSR_ME | MSR_RI);
    int status = program();
    finish(failures + status);
}
