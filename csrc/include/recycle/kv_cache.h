// A key/value cache: [layer, k/v, sequence, head, position, head_dim], contiguous, owned by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

namespace recycle {

enum class CacheType : int32_t { f32 = 0, bf16 = 1 };

struct KvCache {
  std::byte* data = nullptr;
  CacheType type = CacheType::f32;
  int64_t n_sequences = 0;
  int64_t n_kv_heads = 0;
  int64_t capacity = 0;  // positions
  int64_t head_dim = 0;

  int64_t element_bytes() const { return type == CacheType::f32 ? 4 : 2; }
  // The first position of one head: [capacity, head_dim]. kv: 0 keys, 1 values.
  std::byte* head(int64_t layer, int64_t kv, int64_t sequence, int64_t kv_head) const {
    const int64_t index = ((layer * 2 + kv) * n_sequences + sequence) * n_kv_heads + kv_head;
    return data + index * capacity * head_dim * element_bytes();
  }
};

}  // namespace recycle
