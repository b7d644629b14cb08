/* `sc 2` and MSR.S, of a normal VM, and after UV_ESM of a secure one. */
#include "runtime.h"

#define SHARED_PAGE 0x2000000ul
#define OUTSIDE 0x100000ul

static int is_secure;

static void state(void)
{
    check_is("msr-s", !!(mfmsr() & MSR_S), is_secure);
    u64 before = mfmsr();
    mtmsrd(before ^ MSR_S);
    check_is("msr-s-cannot-be-changed", mfmsr() & MSR_S, before & MSR_S);
    try(do_trap, 0, 0);
    check_is("msr-s-in-a-handler", trapped.msr & MSR_S, before & MSR_S);
    check_is("msr-s-after-a-handler", mfmsr() & MSR_S, before & MSR_S);
}

static void errors_of_all(void)
{
    check_is("unknown-ultracall", ucall(0xf0fc, 0, 0, 0), U_FUNCTION);
    check_is("hypercall-number-as-ultracall", ucall(H_RANDOM, 0, 0, 0), U_FUNCTION);
    check_is("write-pate-is-the-hypervisors", ucall(UV_WRITE_PATE, 1, 0, 0), U_PERMISSION);
    check_is("page-in-is-the-hypervisors", ucall(UV_PAGE_IN, 0, 0, 0), U_PERMISSION);
    check_is("return-is-the-hypervisors", ucall(UV_RETURN, 0, 0, 0), U_PERMISSION);
    check_is("ultracall-number-as-hypercall", hcall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 1, 0, 0), H_FUNCTION);
    check_is("esm-without-a-kernel", ucall(UV_ESM, 0, device_tree, 0), U_P2);
    check_is("esm-without-a-tree", ucall(UV_ESM, (u64)_start, 0, 0), U_P3);
}

static void errors_of_a_normal_vm(void)
{
    check_is("share-without-s", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 1, 0), U_PERMISSION);
    check_is("unshare-without-s", ucall(UV_UNSHARE_PAGE, SHARED_PAGE >> 16, 1, 0), U_PERMISSION);
    check_is("unshare-all-without-s", ucall(UV_UNSHARE_ALL_PAGES, 0, 0, 0), U_PERMISSION);
    check_is("esm-without-a-blob", ucall(UV_ESM, (u64)_start, device_tree, 0), U_PARAMETER);
    check_is("still-normal", mfmsr() & MSR_S, 0);
    check("memory-is-intact", read_be32((void *)device_tree) == 0xd00dfeed, "tree begins", read_be32((void *)device_tree));
}

static void sharing(void)
{
    check_is("esm-twice", ucall(UV_ESM, (u64)_start, device_tree, 0), U_RETRY);
    volatile u64 *page = (u64 *)SHARED_PAGE;
    page[0] = 0x5ec2e7;
    page[1023] = 0x5ec2e7;
    check_is("share", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 1, 0), U_SUCCESS);
    check_is("shared-page-is-zero", page[0] | page[1023], 0);
    page[0] = 0x9ab11c;
    check_is("shared-page-holds", page[0], 0x9ab11c);
    check_is("share-twice", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 1, 0), U_SUCCESS);
    check_is("share-twice-keeps", page[0], 0x9ab11c);
    check_is("unshare", ucall(UV_UNSHARE_PAGE, SHARED_PAGE >> 16, 1, 0), U_SUCCESS);
    check_is("unshared-page-is-zero", page[0], 0);
    check_is("share-many", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 8, 0), U_SUCCESS);
    check_is("unshare-all", ucall(UV_UNSHARE_ALL_PAGES, 0, 0, 0), U_SUCCESS);
    check_is("share-nothing", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, 0, 0), U_P3);
    check_is("share-outside-memory", ucall(UV_SHARE_PAGE, OUTSIDE, 1, 0), U_P2);
    check_is("share-across-the-end", ucall(UV_SHARE_PAGE, SHARED_PAGE >> 16, OUTSIDE, 0), U_P3);
    check_is("unshare-outside-memory", ucall(UV_UNSHARE_PAGE, OUTSIDE, 1, 0), U_P2);
}

static void hypercalls_of_a_secure_vm(void)
{
    u32 nothing[1] = {0}, out[8] = {0};
    u64 got[6] = {0};
    check_is("unknown-hypercall", hcall(0x7f0, 0, 0, 0, 0), H_FUNCTION);
    check_is("random", hypercall(got, H_RANDOM, 0, 0, 0, 0, 0, 0), H_SUCCESS);
    check_is("rtas-through-the-bounce-page", rtas("get-time-of-day", nothing, 0, out, 7), 0);
    check("rtas-result-came-back", out[0] >= 2020, "year", out[0]);
    check("svm-call-of-its-own-is-refused", hcall(H_SVM_PAGE_IN, SHARED_PAGE, 0, 16, 0) != H_SUCCESS, "is", 0);
    check("memory-behind-the-program-is-zero", !*(u64 *)(SHARED_PAGE + 0x100000), "is", *(u64 *)(SHARED_PAGE + 0x100000));
    check_is("no-such-file", ucall(UV_ESMB_GET_FILE, 0, 0, 0), U_PARAMETER);
}

int program(void)
{
    is_secure = has_argument("secure");
    state();
    errors_of_all();
    if (is_secure) {
        sharing();
        hypercalls_of_a_secure_vm();
    } else {
        errors_of_a_normal_vm();
    }
    return 0;
}
