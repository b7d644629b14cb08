/*
 * A client program of Open Firmware, as boot loaders are: firmware reads it from the boot partition of a disk and
 * starts it. It prints by the client interface and goes back to firmware, or with `power-off` in the boot arguments
 * ends the machine by RTAS.
 *
 * Cells are big-endian words of 32 bits, also for a program of 64 bits. Source: IEEE 1275 chapter 6, its PowerPC
 * binding; PAPR appendix B.
 */
typedef unsigned int u32;

struct block {
    u32 service, n_args, n_rets, cells[8];
};

extern long call_firmware(struct block *block);
extern long call_rtas(void *block, u32 base, unsigned long entry);

#define CELL(pointer) ((u32)(unsigned long)(pointer))
#define BITS (8 * (int)sizeof(long))

static u32 firmware(const char *service, u32 n_args, u32 n_rets, u32 a, u32 b, u32 c, u32 d)
{
    struct block block = {CELL(service), n_args, n_rets, {a, b, c, d}};
    call_firmware(&block);
    return block.cells[n_args];
}

static u32 find(const char *path)
{
    return firmware("finddevice", 1, 1, CELL(path), 0, 0, 0);
}

static u32 property(u32 node, const char *name, void *buffer, u32 n_bytes)
{
    return firmware("getprop", 4, 1, node, CELL(name), CELL(buffer), n_bytes);
}

static u32 length(const char *text)
{
    u32 n = 0;
    while (text[n])
        n++;
    return n;
}

static void print(const char *text)
{
    u32 stdout;
    property(find("/chosen"), "stdout", &stdout, sizeof stdout);
    firmware("write", 3, 1, stdout, CELL(text), length(text), 0);
}

static int begins_with(const char *text, const char *word)
{
    while (*word)
        if (*text++ != *word++)
            return 0;
    return 1;
}

/* Places RTAS and has it switch the machine off, as a kernel does. */
static void power_off(void)
{
    u32 rtas = find("/rtas"), n_bytes, token;
    property(rtas, "rtas-size", &n_bytes, sizeof n_bytes);
    property(rtas, "power-off", &token, sizeof token);
    u32 base = firmware("claim", 3, 1, 0, n_bytes, 4096, 0);
    u32 opened = firmware("open", 1, 1, CELL("/rtas"), 0, 0, 0);
    struct block method = {CELL("call-method"), 3, 2, {CELL("instantiate-rtas"), opened, base}};
    call_firmware(&method);
    u32 entry = method.cells[4];
    u32 call[] = {token, 2, 1, 0xffffffff, 0xffffffff, 0};
    call_rtas(call, base, entry);
    print("client: RTAS did not switch off\r\n");
}

void client(void)
{
    static char arguments[256], path[256];
    u32 chosen = find("/chosen");
    property(chosen, "bootargs", arguments, sizeof arguments - 1);
    property(chosen, "bootpath", path, sizeof path - 1);
    print(BITS == 64 ? "client: 64 bits" : "client: 32 bits");
    print(", from ");
    print(path);
    print(", arguments <");
    print(arguments);
    print(">\r\n");
    if (begins_with(arguments, "power-off"))
        power_off();
    firmware("exit", 0, 0, 0, 0, 0, 0);
}
