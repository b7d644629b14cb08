/* The radix MMU: every page size, every permission, referenced and changed bits, invalidation, processes. */
#include "runtime.h"

enum { NOT_FOUND = 0x40000000, PROTECTED = 0x08000000, STORE = 0x02000000, NO_EXECUTE = 0x10000000 };
#define AREA 0x1000000000ul
#define BLR 0x4e800020u

static const u32 shifts[] = {12, 16, 21, 30};
static const char *const names[] = {"4K", "64K", "2M", "1G"};

static int named(const char *what, const char *size, int holds, u64 value)
{
    char name[64];
    u32 n = 0;
    for (const char *at = what; *at; at++)
        name[n++] = *at;
    name[n++] = '-';
    for (const char *at = size; *at; at++)
        name[n++] = *at;
    name[n] = 0;
    return check(name, holds, "is", value);
}

/* A page's address of its own in the area, so that sizes never share a table entry. */
static u64 address_of(u32 index)
{
    return AREA + ((u64)index << 32);
}

static u64 real_of(u32 index)
{
    /* A page of 1 GiB is memory as a whole. */
    return shifts[index] == 30 ? 0 : take_memory(1ul << shifts[index]);
}

static void page_sizes(void)
{
    static u64 marker;
    for (u32 index = 0; index < 4; index++) {
        u64 at = address_of(index), real = real_of(index), size = 1ul << shifts[index];
        u64 last = shifts[index] == 30 ? (u64)&marker : size - 8;
        map_page(0, at, real, shifts[index], PTE_ALL);
        *(volatile u64 *)(real + last) = 0x1122334455667788 + index;
        named("load", names[index], *(volatile u64 *)(at + last) == 0x1122334455667788 + index, *(volatile u64 *)(at + last));
        *(volatile u64 *)(at + last) = 0x99aa + index;
        named("store", names[index], *(volatile u64 *)(real + last) == 0x99aa + index, *(volatile u64 *)(real + last));
        trapped.vector = 0;
        try(do_load, at + size, 0);
        named("nothing-behind", names[index], trapped.vector == 0x300 && trapped.dar == at + size, trapped.vector);
    }
}

static void code_in(u64 real)
{
    *(volatile u32 *)real = BLR;
    asm volatile("dcbst 0, %0; sync; icbi 0, %0; isync" : : "r"(real) : "memory");
}

struct expected {
    const char *name;
    u64 flags;
    /* What privileged loads, stores and fetches get, then those of problem state: 0, or why not. */
    u64 load, store, fetch, user_load, user_store, user_fetch;
};

static u64 outcome(u64 vector)
{
    return trapped.vector == vector ? (vector == 0x300 ? trapped.dsisr : trapped.srr1 & 0x58000000) : trapped.vector;
}

static void permissions(void)
{
    static const struct expected table[] = {
        {"none-privileged", PTE_PRIVILEGED, PROTECTED, PROTECTED | STORE, NO_EXECUTE, PROTECTED, PROTECTED | STORE, NO_EXECUTE},
        {"read-privileged", PTE_PRIVILEGED | PTE_READ, 0, PROTECTED | STORE, NO_EXECUTE, PROTECTED, PROTECTED | STORE, NO_EXECUTE},
        {"read-write-privileged", PTE_PRIVILEGED | PTE_READ | PTE_WRITE, 0, 0, NO_EXECUTE, PROTECTED, PROTECTED | STORE, NO_EXECUTE},
        {"read-execute-privileged", PTE_PRIVILEGED | PTE_READ | PTE_EXECUTE, 0, PROTECTED | STORE, 0, PROTECTED, PROTECTED | STORE, PROTECTED},
        {"read", PTE_READ, 0, PROTECTED | STORE, NO_EXECUTE, 0, PROTECTED | STORE, NO_EXECUTE},
        {"read-write", PTE_READ | PTE_WRITE, 0, 0, NO_EXECUTE, 0, 0, NO_EXECUTE},
        {"read-execute", PTE_READ | PTE_EXECUTE, 0, PROTECTED | STORE, 0, 0, PROTECTED | STORE, 0},
        {"all", PTE_READ | PTE_WRITE | PTE_EXECUTE, 0, 0, 0, 0, 0, 0},
    };
    for (u32 index = 0; index < sizeof table / sizeof *table; index++) {
        const struct expected *row = &table[index];
        u64 at = address_of(17 + index), real = take_memory(0x10000);
        code_in(real);
        map_page(0, at, real, 16, row->flags);
        try(do_load, at, 0);
        named("load", row->name, outcome(0x300) == row->load, outcome(0x300));
        try(do_store, at + 8, 1);
        named("store", row->name, outcome(0x300) == row->store, outcome(0x300));
        try(jump, at, 0);
        named("fetch", row->name, !outcome(0x400) == !row->fetch, outcome(0x400));
        try_as_user(do_load, at, 0);
        named("user-load", row->name, outcome(0x300) == row->user_load, outcome(0x300));
        try_as_user(do_store, at + 8, 1);
        named("user-store", row->name, outcome(0x300) == row->user_store, outcome(0x300));
        try_as_user(jump, at, 0);
        named("user-fetch", row->name, !outcome(0x400) == !row->user_fetch, outcome(0x400));
    }
}

static void referenced_and_changed(void)
{
    u64 at = address_of(32), entry = map_page(0, at, take_memory(0x1000), 12, PTE_ALL);
    u64 both = PTE_REFERENCED | PTE_CHANGED;
    check_is("untouched", read_entry(entry) & both, 0);
    *(volatile u64 *)at;
    check_is("referenced-by-load", read_entry(entry) & both, PTE_REFERENCED);
    *(volatile u64 *)at = 1;
    check_is("changed-by-store", read_entry(entry) & both, both);
}

static void invalidation(void)
{
    for (u32 index = 0; index < 3; index++) {
        u64 at = address_of(48 + index), first = real_of(index), second = real_of(index);
        *(volatile u64 *)first = 1;
        *(volatile u64 *)second = 2;
        u64 entry = map_page(0, at, first, shifts[index], PTE_ALL);
        named("before-change", names[index], *(volatile u64 *)at == 1, *(volatile u64 *)at);
        map_page(0, at, second, shifts[index], PTE_ALL);
        flush_page(0, at, shifts[index]);
        named("after-tlbie", names[index], *(volatile u64 *)at == 2, *(volatile u64 *)at);
        write_entry(entry, 0);
        flush_page(0, at, shifts[index]);
        try(do_load, at, 0);
        named("unmapped-after-tlbie", names[index], trapped.vector == 0x300 && trapped.dsisr == NOT_FOUND, trapped.vector);
        *(volatile u64 *)second = 3;
        map_page(0, at, second, shifts[index], PTE_READ | PTE_PRIVILEGED);
        try(do_store, at, 4);
        named("read-only-now", names[index], trapped.vector == 0x300 && trapped.dsisr == (PROTECTED | STORE), trapped.dsisr);
        named("mapped-again", names[index], *(volatile u64 *)at == 3, *(volatile u64 *)at);
    }
}

static void processes(void)
{
    u64 at = address_of(64), mine = take_memory(0x10000), other = take_memory(0x10000), upper = at | 0xc000000000000000;
    *(volatile u64 *)mine = 0x10;
    *(volatile u64 *)other = 0x20;
    map_page(0, at, mine, 16, PTE_ALL);
    map_page(1, at, other, 16, PTE_ALL);
    check_is("process-0", *(volatile u64 *)at, 0x10);
    mtspr(SPR_PID, 1);
    barrier();
    check_is("process-1", *(volatile u64 *)at, 0x20);
    check_is("quadrant-3-is-process-0", *(volatile u64 *)upper, 0x10);
    mtspr(SPR_PID, 0);
    barrier();
    check_is("process-0-again", *(volatile u64 *)at, 0x10);
}

static void crossing(void)
{
    u64 at = address_of(80), first = take_memory(0x1000);
    take_memory(0x1000);
    u64 second = take_memory(0x1000);
    map_page(0, at, first, 12, PTE_ALL);
    map_page(0, at + 0x1000, second, 12, PTE_ALL);
    *(volatile u64 *)(at + 0xffc) = 0x0102030405060708;
    check_is("store-across-pages-first", *(volatile u32 *)(first + 0xffc), (mfmsr() & MSR_LE) ? 0x05060708 : 0x01020304);
    check_is("store-across-pages-second", *(volatile u32 *)second, (mfmsr() & MSR_LE) ? 0x01020304 : 0x05060708);
    check_is("load-across-pages", *(volatile u64 *)(at + 0xffc), 0x0102030405060708);
    *(volatile u32 *)(at + 0x1ffc) = 7;
    try(do_load, at + 0x1ffc, 0);
    check("load-across-the-end-0x300", trapped.vector == 0x300, "vector", trapped.vector);
    check_is("load-across-the-end-dar", trapped.dar >> 12, (at + 0x2000) >> 12);
}

static void changed_code(void)
{
    u64 at = address_of(96), real = take_memory(0x1000);
    map_page(0, at, real, 12, PTE_ALL);
    *(volatile u32 *)(at + 4) = BLR;
    for (u32 value = 1; value < 4; value++) {
        *(volatile u32 *)at = 0x38600000 | value; /* li r3,value */
        asm volatile("dcbst 0, %0; sync; icbi 0, %0; isync" : : "r"(at) : "memory");
        check_is("changed-code-runs", try(jump, at, 0), value);
    }
    for (u32 value = 4; value < 7; value++) {
        *(volatile u32 *)real = 0x38600000 | value;
        asm volatile("dcbst 0, %0; sync; icbi 0, %0; isync" : : "r"(real) : "memory");
        flush_page(0, at, 12);
        check_is("code-changed-by-another-address-runs-after-tlbie", try(jump, at, 0), value);
    }
}

int program(void)
{
    mmu_on();
    page_sizes();
    permissions();
    referenced_and_changed();
    invalidation();
    processes();
    crossing();
    changed_code();
    mmu_off();
    return 0;
}
