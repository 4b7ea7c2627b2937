// Cuts a scratch buffer, which the caller owns, into aligned arrays. An arena without a buffer only counts:
// used() is then the size the buffer must have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

namespace recycle {

class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  // An uninitialised array of `count` elements, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    std::byte* array = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(array);
  }

  int64_t used() const { return used_; }  // bytes

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace recycle
