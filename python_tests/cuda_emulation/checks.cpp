// Which bytes of shared memory and scratch were written (checks.h).
#include "checks.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator.h"

namespace recycle::cuda::emulator {

#if defined(RECYCLE_EMULATE_CHECKS)

namespace {

struct Range {
  const std::byte* begin = nullptr;
  std::vector<bool> is_written;

  void track(const void* memory, int64_t bytes) {
    begin = static_cast<const std::byte*>(memory);
    is_written.assign(bytes, false);
  }
  bool holds(const void* at, size_t bytes) const {
    const auto offset = static_cast<size_t>(static_cast<const std::byte*>(at) - begin);
    return offset < is_written.size() && bytes <= is_written.size() - offset;
  }
  void write(const void* at, size_t bytes) {
    if (!holds(at, bytes)) return;
    const size_t offset = static_cast<const std::byte*>(at) - begin;
    for (size_t i = 0; i < bytes; ++i) is_written[offset + i] = true;
  }
  void read(const void* at, size_t bytes, const char* what, void* from) const {
    if (!holds(at, bytes)) return;
    const size_t offset = static_cast<const std::byte*>(at) - begin;
    for (size_t i = 0; i < bytes; ++i) {
      if (is_written[offset + i]) continue;
      const dim3 block = block_index();
      std::fprintf(stderr, "EMULATION: %s that nothing has written: byte %zu, block %u %u %u, thread %d, code %p\n",
                   what, offset + i, block.x, block.y, block.z, thread_index(), from);
      std::_Exit(70);
    }
  }
};

Range shared, scratch;

}  // namespace

void track_shared(const void* begin, int64_t bytes) { shared.track(begin, bytes); }
void track_scratch(const void* begin, int64_t bytes) { scratch.track(begin, bytes); }

void check_atomic(unsigned* at, void* from) {
  for (Range* range : {&shared, &scratch}) {
    range->read(at, sizeof *at, "an atomic operation on memory", from);
    range->write(at, sizeof *at);
  }
}

uintptr_t call_path(const char* stack, size_t bytes) {
  uintptr_t path = 0;
  const auto begin = reinterpret_cast<uintptr_t>(stack);
  auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  while (frame - begin < bytes - 16) {
    const auto* words = reinterpret_cast<const uintptr_t*>(frame);
    path = path * 31 + words[1];
    frame = words[0];
  }
  return path;
}

extern "C" {
void __asan_loadN_noabort(void* at, size_t bytes) {
  shared.read(at, bytes, "a read of shared memory", __builtin_return_address(0));
}
void __asan_storeN_noabort(void* at, size_t bytes) {
  shared.write(at, bytes);
  scratch.write(at, bytes);
}
#define RECYCLE_ACCESS(bytes)                                                       \
  void __asan_load##bytes##_noabort(void* at) {                                     \
    shared.read(at, bytes, "a read of shared memory", __builtin_return_address(0)); \
  }                                                                                 \
  void __asan_store##bytes##_noabort(void* at) { __asan_storeN_noabort(at, bytes); }
RECYCLE_ACCESS(1)
RECYCLE_ACCESS(2)
RECYCLE_ACCESS(4)
RECYCLE_ACCESS(8)
RECYCLE_ACCESS(16)
void __asan_handle_no_return() {}
}

#else

void track_scratch(const void*, int64_t) {}

#endif

}  // namespace recycle::cuda::emulator
