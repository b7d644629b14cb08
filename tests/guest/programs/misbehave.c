/* Ends that a program should not have, by the word on its command line. */
#include "runtime.h"

static void nowhere(void)
{
    ((void (*)(void))0x7000000000)();
}

int program(void)
{
    static const char text[] __attribute__((aligned(64))) = "gave up on purpose";
    u32 words[2] = {(u32)(u64)text, 0};
    put_line("misbehaving");
    if (has_argument("crash"))
        nowhere();
    if (has_argument("os-term"))
        rtas("ibm,os-term", words, 1, 0, 0);
    if (has_argument("power-off")) {
        words[0] = words[1] = 0xffffffff;
        rtas("power-off", words, 2, 0, 0);
    }
    if (has_argument("flood"))
        for (u32 n = 0; n < 200; n++)
            put_line("a line of sixty-three characters that nobody will want to read");
    if (has_argument("large-status"))
        finish(0x100);
    if (has_argument("finish"))
        return 0;
    for (;;)
        if (has_argument("idle"))
            hcall(H_CEDE, 0, 0, 0, 0);
}
