/* Two educational devices on one bridge: that of slot 1 translates as the bus does, that of slot 2 alone.
 *
 * Each gets a window from where the device tree says it has one, and is given the other's bus address too. */
#include "runtime.h"

#define BRIDGE "/pci@800000020000000"
#define WINDOW 0x200080000000ul
#define BUS_WINDOW 0x80000000u
#define BAR_BYTES 0x100000u
#define PAGE 4096

enum { H_LOGICAL_CI_STORE = 0x40, CONFIG_COMMAND = 4, CONFIG_BAR0 = 0x10, MEMORY_AND_MASTER = 6 };
enum { IDENTIFICATION = 0, DMA_SOURCE = 0x80, DMA_DESTINATION = 0x88, DMA_COUNT = 0x90, DMA_COMMAND = 0x98 };
enum { RUN = 1, TO_RAM = 2, BUFFER = 0x40000 };

struct device {
    u32 slot;
    u64 bar, ioba;
    u32 liobn;
    u8 *page;
};

static u8 pages[2][PAGE] __attribute__((aligned(PAGE)));

/* The calls load and store big-endian numbers, the registers are little-endian. */
static u64 load(const struct device *device, u64 offset, u64 n_bytes)
{
    u64 value[6] = {0};
    hypercall(value, H_LOGICAL_CI_LOAD, n_bytes, device->bar + offset, 0, 0, 0, 0);
    return __builtin_bswap64(value[0]) >> (64 - 8 * n_bytes);
}

static void store(const struct device *device, u64 offset, u64 value)
{
    hcall(H_LOGICAL_CI_STORE, 8, device->bar + offset, __builtin_bswap64(value), 0);
}

static void configure(u32 slot, u32 offset, u32 n_bytes, u32 value)
{
    u32 args[5] = {slot << 11 | offset, 0x8000000, 0x20000000, n_bytes, value};
    check_is("configuration-write", rtas("ibm,write-pci-config", args, 5, 0, 0), 0);
}

/* The window of the node itself, or of the bridge above it, as Linux looks for it. */
static u32 find_window(const char *node)
{
    return tree_word(node, "ibm,dma-window", tree_word(BRIDGE, "ibm,dma-window", 0));
}

static struct device bring_up(u32 slot, const char *node)
{
    struct device device = {slot, WINDOW + slot * BAR_BYTES, slot * 0x100000, find_window(node), pages[slot - 1]};
    configure(slot, CONFIG_BAR0, 4, BUS_WINDOW + slot * BAR_BYTES);
    configure(slot, CONFIG_COMMAND, 2, MEMORY_AND_MASTER);
    check_is("identification", load(&device, IDENTIFICATION, 4), 0x010000ed);
    check_is("map", hcall(H_PUT_TCE, device.liobn, device.ioba, (u64)device.page | 3, 0), H_SUCCESS);
    return device;
}

static void transfer(const struct device *device, u64 source, u64 destination, u64 command)
{
    store(device, DMA_SOURCE, source);
    store(device, DMA_DESTINATION, destination);
    store(device, DMA_COUNT, PAGE);
    store(device, DMA_COMMAND, command | RUN);
    while (load(device, DMA_COMMAND, 8) & RUN)
        ;
}

static void fill(u8 *page, u8 value)
{
    for (int n = 0; n < PAGE; n++)
        page[n] = value + n % 7;
}

static u64 n_wrong(const u8 *page, u8 value)
{
    u64 wrong = 0;
    for (int n = 0; n < PAGE; n++)
        wrong += page[n] != (u8)(value + n % 7);
    return wrong;
}

/* Its page to the buffer and back, by its own address. */
static void reaches(const struct device *device, const char *name)
{
    fill(device->page, 16 * device->slot);
    transfer(device, device->ioba, BUFFER, 0);
    fill(device->page, 99);
    transfer(device, BUFFER, device->ioba, TO_RAM);
    check_is(name, n_wrong(device->page, 16 * device->slot), 0);
}

/* The other's address is none of its own: nothing is written there. */
static void does_not_reach(const struct device *device, const struct device *other, const char *name)
{
    fill(other->page, 77);
    transfer(device, BUFFER, other->ioba, TO_RAM);
    check_is(name, n_wrong(other->page, 77), 0);
}

int program(void)
{
    struct device bus = bring_up(1, BRIDGE "/legacy-device@1"), own = bring_up(2, BRIDGE "/legacy-device@2");
    check_is("window-of-the-bus", bus.liobn, 0x80000000);
    check_is("window-of-its-own", own.liobn, 0x80000004);
    reaches(&bus, "bus-device-reaches-its-page");
    reaches(&own, "own-device-reaches-its-page");
    does_not_reach(&bus, &own, "bus-device-does-not-reach-the-own-window");
    does_not_reach(&own, &bus, "own-device-does-not-reach-the-bus-window");
    reaches(&bus, "bus-device-goes-on");
    reaches(&own, "own-device-goes-on");
    return 0;
}
