// Cuts a caller's scratch buffer into aligned arrays. Run once without memory it says how many bytes are
// needed; run again on the buffer it hands the arrays out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

namespace recycle {

class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    std::byte* at = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(at);
  }

  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace recycle
