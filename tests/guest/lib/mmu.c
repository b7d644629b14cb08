/*
 * The radix MMU: a process table with two processes, trees of 13, 9, 9 and 9 or 5 bits over 52-bit addresses.
 *
 * Quadrant 0 belongs to the process in PID, quadrant 3 (0xc000...) to process 0. Source: Power ISA 3.0 III 5.7.10.
 */
#include "runtime.h"

enum { PROC_TABLE_NEW_RADIX_GTSE = 0x18 | 0x4 | 0x1, TABLE_SHIFT = 16 };
#define ENTRY_VALID (1ul << 63)
#define ENTRY_LEAF (1ul << 62)
#define NEXT_TABLE 0x0fffffffffffff00ul
#define TREE_52_BITS ((5ul << 5) | (2ul << 61))
#define ROOT_BITS 13

static u64 next_free = 0x1000000;
static u64 process_table;
static u64 roots[2];

u64 take_memory(u64 n_bytes)
{
    u64 at = (next_free + n_bytes - 1) & -n_bytes;
    next_free = at + n_bytes;
    for (u64 n = 0; n < n_bytes; n += 8)
        *(volatile u64 *)(at + n) = 0;
    return at;
}

u64 read_entry(u64 at)
{
    return read_be64((void *)at);
}

void write_entry(u64 at, u64 value)
{
    write_be64((void *)at, value);
    asm volatile("ptesync" : : : "memory");
}

static u64 next_table(u64 entry_at, u32 bits)
{
    u64 entry = read_entry(entry_at);
    if (!entry) {
        u64 n_bytes = 8ul << bits;
        entry = ENTRY_VALID | take_memory(n_bytes < 4096 ? 4096 : n_bytes) | bits;
        write_entry(entry_at, entry);
    }
    return entry & NEXT_TABLE;
}

u64 map_page(u32 pid, u64 address, u64 real, u32 shift, u64 flags)
{
    u64 offset = address & ((1ul << 52) - 1);
    u64 at = roots[pid] + ((offset >> 39) & 0x1fff) * 8;
    u64 table = next_table(at, 9);
    at = table + ((offset >> 30) & 0x1ff) * 8;
    if (shift < 30) {
        table = next_table(at, 9);
        at = table + ((offset >> 21) & 0x1ff) * 8;
    }
    if (shift < 21) {
        u32 bits = 21 - shift;
        table = next_table(at, bits);
        at = table + ((offset >> shift) & ((1ul << bits) - 1)) * 8;
    }
    write_entry(at, ENTRY_VALID | ENTRY_LEAF | real | flags);
    return at;
}

void flush_page(u32 pid, u64 address, u32 shift)
{
    /* RB: the page and its size (AP: 4 KiB 0, 64 KiB 5, 2 MiB 1, 1 GiB 2); RS: the process. RIC 0, PRS 1, R 1. */
    u64 size = shift == 16 ? 5 : shift == 21 ? 1 : shift == 30 ? 2 : 0;
    register u64 rb asm("r10") = (address & ~0xffful) | size << 5;
    register u64 rs asm("r11") = (u64)pid << 32;
    asm volatile("ptesync; .long 0x7c030264 | 10 << 11 | 11 << 21; eieio; tlbsync; ptesync" : : "r"(rb), "r"(rs) : "memory");
    barrier();
}

void mmu_on(void)
{
    if (!process_table) {
        process_table = take_memory(1ul << TABLE_SHIFT);
        for (u32 pid = 0; pid < 2; pid++) {
            roots[pid] = take_memory(8ul << ROOT_BITS);
            write_entry(process_table + pid * 16, TREE_52_BITS | roots[pid] | ROOT_BITS);
            map_page(pid, 0, 0, 30, PTE_ALL);
            map_page(pid, USER_OFFSET, 0, 30, PTE_READ | PTE_WRITE | PTE_EXECUTE);
        }
        i64 code = hcall(H_REGISTER_PROC_TBL, PROC_TABLE_NEW_RADIX_GTSE, process_table, 0, TABLE_SHIFT - 12);
        if (code) {
            check("H_REGISTER_PROC_TBL", 0, "returned", code);
            finish(102);
        }
        mtspr(SPR_PID, 0);
    }
    mtmsrd(mfmsr() | MSR_IR | MSR_DR);
}

void mmu_off(void)
{
    mtmsrd(mfmsr() & ~(MSR_IR | MSR_DR));
}
