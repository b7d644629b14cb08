/* What a bare-metal program has: the terminal, a report, hypercalls, interrupts that it can wait for, its end. */
#ifndef RUNTIME_H
#define RUNTIME_H

#include "registers.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

/* The program. What it returns is added to the number of `not ok` lines: the exit status. */
int program(void);

/* -- terminal and report -- */

void put_text(const char *text);
void put_hex(u64 value);
void put_line(const char *text);

/* `ok NAME`, or `not ok NAME REASON: VALUE` with the value in hexadecimal. Returns whether it is ok. */
int check(const char *name, int holds, const char *reason, u64 value);
/* Whether `got` is `wanted`. */
int check_is(const char *name, u64 got, u64 wanted);
/* A comment line: `# NAME: VALUE`. */
void note(const char *name, u64 value);

/* Ends the VM. */
void finish(u32 status) __attribute__((noreturn));

/* -- the machine -- */

extern u64 device_tree;
extern char _start[], _end[];

/* A property of the device tree: `path` as "/rtas", at most 6 nodes deep. 0 when there is none; its length in `n_bytes` unless that is 0. */
const u8 *tree_property(const char *path, const char *name, u32 *n_bytes);
/* Its first big-endian word, or `otherwise`. */
u32 tree_word(const char *path, const char *name, u32 otherwise);
/* Whether the command line holds the word. */
int has_argument(const char *word);

u32 read_be32(const void *at);
u64 read_be64(const void *at);
void write_be32(void *at, u32 value);
void write_be64(void *at, u64 value);

i64 hypercall(u64 *results, u64 number, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6);
i64 ultracall(u64 *results, u64 number, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6);
#define hcall(number, a1, a2, a3, a4) hypercall(0, number, a1, a2, a3, a4, 0, 0)
#define ucall(number, a1, a2, a3) ultracall(0, number, a1, a2, a3, 0, 0, 0)

/* RTAS: the status; up to 4 words after it go to `results` unless that is 0. */
i64 rtas(const char *service, const u32 *args, u32 n_args, u32 *results, u32 n_results);

/* -- interrupts -- */

struct frame {
    u64 gpr[32];
    u64 vector, lr, ctr, xer, cr, srr0, srr1, dar, dsisr, msr;
};

/* The last interrupt that ended an attempt, or was counted; `vector` is 0 when there was none. */
extern volatile struct frame trapped;
/* How often each vector was taken, by vector / 0x20. */
extern volatile u64 taken[128];

/* What is added to the address that an attempt's function returns to. */
extern u64 attempt_offset;
u64 attempt(void *function, u64 a, u64 b, u64 msr);
/* attempt() in problem state: translation is on, and the function has no memory of its own but what it is given. */
u64 try_as_user(void *function, u64 a, u64 b);
/* attempt() in the present state; what was trapped is forgotten first. */
u64 try(void *function, u64 a, u64 b);

void do_nothing(void), do_trap(void), do_illegal(void), do_sc(void), do_load(void), do_load_word(void), do_store(void);
void do_ldarx(void), do_fadd(void), do_vadd(void), do_xvadd(void), do_mttar(void), do_mtdscr(void), do_mfmsr(void);
void do_scv(void), do_div(void), do_mfsrr0(void);
void do_hypercall(void), do_scv0(void), do_scv1(void), jump(void);
extern char at_trap[], at_illegal[], at_sc[], at_load[], at_load_word[], at_store[], at_ldarx[], at_fadd[], at_vadd[];
extern char at_hypercall[], at_scv[], at_div[], at_xvadd[], at_mttar[], at_mtdscr[], at_mfmsr[], at_mfsrr0[], at_scv1[];
extern u64 scv_result[3];

#define mfspr(number) ({ u64 value_; asm volatile("mfspr %0, %1" : "=r"(value_) : "i"(number)); value_; })
#define mtspr(number, value) asm volatile("mtspr %0, %1" : : "i"(number), "r"((u64)(value)) : "memory")
#define mfmsr() ({ u64 value_; asm volatile("mfmsr %0" : "=r"(value_)); value_; })
#define mtmsrd(value) asm volatile("mtmsrd %0; isync" : : "r"((u64)(value)) : "memory")
#define barrier() asm volatile("sync; isync" : : : "memory")

/* Numbers: Linux arch/powerpc/include/asm/hvcall.h and ultravisor-api.h. */
enum {
    H_SUCCESS = 0, H_FUNCTION = -2, H_PRIVILEGE = -3, H_PARAMETER = -4, H_P2 = -55, H_P3 = -56, H_P4 = -57,
    H_UNSUPPORTED = -67, H_SIGNAL_SYS_RESET = 0x380, SYS_RESET_ALL = -1, SYS_RESET_OTHERS = -2,
    H_PUT_TCE = 0x20, H_LOGICAL_CI_LOAD = 0x3c, H_GET_TERM_CHAR = 0x54, H_PUT_TERM_CHAR = 0x58, H_EOI = 0x64,
    H_CPPR = 0x68, H_IPI = 0x6c, H_XIRR = 0x74, H_CEDE = 0xe0, H_CONFER = 0xe4, H_PROD = 0xe8, H_RANDOM = 0x300, H_SET_MODE = 0x31c,
    H_REGISTER_PROC_TBL = 0x37c, H_RTAS = 0xf000, H_SVM_PAGE_IN = 0xef00,
};
enum {
    U_SUCCESS = 0, U_FUNCTION = -2, U_PARAMETER = -4, U_PERMISSION = -11, U_P2 = -55, U_P3 = -56, U_RETRY = -5,
    UV_WRITE_PATE = 0xf104, UV_ESM = 0xf110, UV_RETURN = 0xf11c, UV_PAGE_IN = 0xf128, UV_SHARE_PAGE = 0xf130,
    UV_UNSHARE_PAGE = 0xf134, UV_UNSHARE_ALL_PAGES = 0xf140, UV_ESMB_GET_FILE = 0xf14c,
};
enum { MODE_LITTLE_ENDIAN = 4, MODE_TRANSLATION = 3 };
/* -- translation (lib/mmu.c) -- */

enum { PTE_EXECUTE = 1, PTE_WRITE = 2, PTE_READ = 4, PTE_PRIVILEGED = 8, PTE_CHANGED = 0x80, PTE_REFERENCED = 0x100 };
#define PTE_ALL (PTE_EXECUTE | PTE_WRITE | PTE_READ | PTE_PRIVILEGED)
/* Where problem state sees the program. */
#define USER_OFFSET 0x2000000000ul

/* Registers a process table and turns translation on: memory lies where it lay, for privileged state only. */
void mmu_on(void);
void mmu_off(void);
/* Memory for tables and pages: zeroed, aligned to its size, a power of 2. */
u64 take_memory(u64 n_bytes);
/* Maps one page of 2^shift bytes (12, 16, 21, 30) for process `pid` (0 or 1); returns the address of its entry. */
u64 map_page(u32 pid, u64 address, u64 real, u32 shift, u64 flags);
/* What an entry is now. */
u64 read_entry(u64 at);
void write_entry(u64 at, u64 value);
/* Forgets cached translations of one page of process `pid`. */
void flush_page(u32 pid, u64 address, u32 shift);

#define SECURE_PAGE_BYTES 0x10000ul

#endif
