// csrc/include/recycle/arena.h for AddressSanitizer: behind each array stand bytes that nothing may touch.
#pragma once

#include <sanitizer/asan_interface.h>

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

namespace recycle {

class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t size = round_up(bytes, kAlign) + kAlign;
    std::byte* array = base_ + used_;
    if (base_ != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(array, size);
      ASAN_POISON_MEMORY_REGION(array + bytes, size - bytes);
    }
    used_ += size;
    return reinterpret_cast<T*>(array);
  }

  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace recycle
