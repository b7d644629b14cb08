/*
 * kexec KERNEL COMMAND_LINE [INITRD], for a guest's Linux: loads the kernel and starts it at once. busybox has no such
 * program. It stands alone: no library, four system calls.
 */
enum {
    SYS_EXIT = 1, SYS_WRITE = 4, SYS_OPEN = 5, SYS_REBOOT = 88, SYS_KEXEC_FILE_LOAD = 382,
    KEXEC_FILE_NO_INITRAMFS = 4, REBOOT_MAGIC1 = 0xfee1dead, REBOOT_MAGIC2 = 672274793, REBOOT_KEXEC = 0x45584543,
};

/* The result, or less than 0: the processor tells an error by a bit of its condition register. */
static long system_call(long number, long a, long b, long c, long d, long e)
{
    register long r0 asm("r0") = number;
    register long r3 asm("r3") = a;
    register long r4 asm("r4") = b;
    register long r5 asm("r5") = c;
    register long r6 asm("r6") = d;
    register long r7 asm("r7") = e;
    asm volatile("sc; bns+ 1f; neg %1, %1; 1:"
                 : "+r"(r0), "+r"(r3), "+r"(r4), "+r"(r5), "+r"(r6), "+r"(r7)
                 :
                 : "r8", "r9", "r10", "r11", "r12", "cr0", "ctr", "memory");
    return r3;
}

static long length(const char *text)
{
    long n = 0;
    while (text[n])
        n++;
    return n;
}

static void leave(const char *what, long error)
{
    char number[] = ": error 000\n";
    for (int at = 10; at > 7; at--, error /= 10)
        number[at] = '0' + error % 10;
    system_call(SYS_WRITE, 2, (long)what, length(what), 0, 0);
    system_call(SYS_WRITE, 2, (long)number, length(number), 0, 0);
    system_call(SYS_EXIT, 1, 0, 0, 0, 0);
}

static long opened(const char *path)
{
    long fd = system_call(SYS_OPEN, (long)path, 0, 0, 0, 0);
    if (fd < 0)
        leave(path, -fd);
    return fd;
}

void run(long *stack)
{
    long n_arguments = stack[0];
    char **arguments = (char **)&stack[1];
    if (n_arguments < 3)
        leave("kexec KERNEL COMMAND_LINE [INITRD]", 22);
    long kernel = opened(arguments[1]), initrd = n_arguments > 3 ? opened(arguments[3]) : -1;
    long flags = initrd < 0 ? KEXEC_FILE_NO_INITRAMFS : 0;
    long line_bytes = length(arguments[2]) + 1;
    long code = system_call(SYS_KEXEC_FILE_LOAD, kernel, initrd, line_bytes, (long)arguments[2], flags);
    if (code < 0)
        leave("kexec_file_load", -code);
    code = system_call(SYS_REBOOT, (int)REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_KEXEC, 0, 0);
    leave("reboot", -code);
}

asm(".globl _start; _start: mr 3, 1; clrrdi 1, 1, 4; stdu 1, -64(1); bl run");
