// Large outputs, recycled.  glibc maps every allocation above 32 MB anew and returns it when it is freed, and the
// kernel then clears it page by page, which costs several times what a convolution does.  Here outputs are cut from one
// range of addresses, in huge pages, and what is freed waits for the next outputs, whatever their sizes.  All but the
// last 128 MB of it is the kernel's to take (MADV_FREE), so that little is withheld from a machine that runs out of
// memory.
#pragma once

#include <cstdint>

namespace xsep::cpu {

// Whether this platform has what it takes and the process may reserve the addresses; else allocate() returns null.
bool recycles();

// At least `bytes` bytes, aligned to 4096, with arbitrary contents; null if the system has none.  Thread-safe.
void* allocate(int64_t bytes);
void release(void* memory);

// Bytes that wait, at most; 0 keeps none.  A quarter of the machine's memory until it is set.
void set_limit(int64_t bytes);
int64_t waiting_bytes();
// Gives all that waits back to the system.
void release_waiting();

}  // namespace xsep::cpu
