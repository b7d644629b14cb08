/* Something to debug: a loop that counts, stores and calls. It ends when a debugger sets `let_go`. */
#include "runtime.h"

volatile unsigned long rounds;
volatile unsigned long let_go;
volatile unsigned char secret[] = "plain text of the guest";
volatile unsigned long table[16];

__attribute__((noinline)) unsigned long work(unsigned long n)
{
    table[n % 16] = n;
    rounds = n;
    return n + 1;
}

int program(void)
{
    unsigned long n = 1;
    put_line("ready to be debugged");
    while (!let_go)
        n = work(n);
    put_line("let go");
    return 3;
}
