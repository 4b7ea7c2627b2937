// For RECYCLE_EMULATE_CHECKS, with kernels that are compiled with -fsanitize=kernel-address: the compiler then calls a
// function of ours before each access (checks.cpp). In the other variants nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace recycle::cuda::emulator {

#if defined(RECYCLE_EMULATE_CHECKS)

// The memory of the block that starts: nothing is written yet.
void track_shared(const void* begin, int64_t bytes);
// Ends the process if nothing has written to *at. from: the caller's place in the code.
void check_atomic(unsigned* at, void* from);
// A number for the chain of calls on a thread's stack. The kernels are compiled without optimization: one place of
// the source is one place of the code.
uintptr_t call_path(const char* stack, size_t bytes);

#else

inline void track_shared(const void*, int64_t) {}
inline void check_atomic(unsigned*, void*) {}
inline uintptr_t call_path(const char*, size_t) { return 0; }

#endif

}  // namespace recycle::cuda::emulator
