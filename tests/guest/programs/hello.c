/* The smallest program: a line on the terminal, and an exit status from the command line (`status-3`). */
#include "runtime.h"

int program(void)
{
    put_line("hello from bare metal");
    put_line((mfmsr() & MSR_LE) ? "little-endian" : "big-endian");
    put_line((mfmsr() & MSR_S) ? "secure" : "normal");
    for (int status = 1; status < 10; status++) {
        char word[] = {'s', 't', 'a', 't', 'u', 's', '-', '0' + status, 0};
        if (has_argument(word))
            return status;
    }
    return 0;
}
