// Large outputs, recycled.  glibc maps every allocation above 32 MB anew and returns it when it is freed, and the
// kernel then clears it page by page, which costs several times what a convolution does.  Here memory comes in huge
// pages, and what is freed waits for the next output of about its size, or makes room for one of another.  All but the
// last 128 MB of it is the kernel's to take (MADV_FREE), so that little is withheld from a machine that runs out of
// memory.
#pragma once

#include <cstdint>

namespace xsep::cpu {

// Whether this platform has what it takes; elsewhere allocate() returns null.
bool recycles();

// At least `bytes` bytes, aligned to a huge page, with arbitrary contents; null if the system has none.  Thread-safe.
void* allocate(int64_t bytes);
void release(void* memory);

// Bytes that wait, at most; 0 keeps none.  A quarter of the machine's memory until it is set.
void set_limit(int64_t bytes);
int64_t waiting_bytes();
// Gives all that waits back to the system.
void release_waiting();

}  // namespace xsep::cpu
