// Huge pages (2 MiB on Linux) for memory that was not written to yet.
//
// Each step reads the weights from end to end. With pages of 4 KiB every 64 cache lines of a stream cost a walk of the
// page table, and the hardware prefetchers stop at the end of each page.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace recycle {

// A request: memory works without huge pages too, so a refusal is ignored.
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
