// What the emulator tells ThreadSanitizer of CUDA's order of memory accesses. Without RECYCLE_EMULATE_RACES nothing.
//
//   barriers             release and acquire among the threads of the block, or of the warp
//   shuffles             no order: CUDA promises none
//   atomics              relaxed; a fence before one releases, and a fence after one acquires what it read
//   blocks of a launch   no order but through atomics
//   wait_for_previous()  acquires all that the previous kernel's threads did; before it, a kernel that overlaps has no
//                        order with the previous one
//
// ThreadSanitizer keeps four accesses of a word, and its clocks cost time in proportion to the number of fibers. So the
// fibers of a block run again two blocks or two launches later: what is then ordered by mistake is found in
// another order of blocks.
#pragma once

#include <cstdint>

#if defined(RECYCLE_EMULATE_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
unsigned __tsan_atomic32_fetch_add(volatile unsigned* at, unsigned value, int order);
}
#endif

namespace recycle::cuda::emulator {

#if defined(RECYCLE_EMULATE_RACES)

inline constexpr bool kOrders = true;

// A clock, which threads release to and acquire from.
struct Sync {
  alignas(8) char clock[8];
  void acquire() { __tsan_acquire(clock); }
  void release() { __tsan_release(clock); }
};

// A fiber of ThreadSanitizer; by default that of the caller.
struct Fiber {
  void* fiber = nullptr;

  static Fiber current() { return {__tsan_get_current_fiber()}; }
  void create() { fiber = __tsan_create_fiber(0); }
  void enter() const { __tsan_switch_to_fiber(fiber, 1); }  // 1: without synchronization
};

inline unsigned relaxed_add(unsigned* at, unsigned value) { return __tsan_atomic32_fetch_add(at, value, 0); }

#else

inline constexpr bool kOrders = false;

struct Sync {
  void acquire() {}
  void release() {}
};

struct Fiber {
  static Fiber current() { return {}; }
  void create() {}
  void enter() const {}
};

inline unsigned relaxed_add(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at += value;
  return before;
}

#endif

}  // namespace recycle::cuda::emulator
