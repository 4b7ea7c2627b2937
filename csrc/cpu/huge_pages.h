// Asks the system to back memory with huge pages (2 MiB on Linux), before it is first written.
//
// The weights are read from end to end each step. In pages of 4 KiB that is one walk of the page table
// for every 64 cache lines of each stream, and the hardware's prefetchers stop at each page's end.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace recycle {

// Whatever the system answers: memory works without, too.
inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace recycle
