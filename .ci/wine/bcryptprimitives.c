/* For Wine only, never shipped: the random bytes that Rust's standard library asks Windows 10 for, and that
 * Wine 8 has under an older name. */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(unsigned char *out, SIZE_T length) {
    while (length > 0) {
        ULONG part = length > 0x10000000 ? 0x10000000 : (ULONG)length;
        if (!RtlGenRandom(out, part)) {
            return FALSE;
        }
        out += part;
        length -= part;
    }
    return TRUE;
}
