// A key/value cache: [layer, k/v, sequence, head, position, row], contiguous, owned by the caller. A row holds
// head_dim floats, or head_dim bfloat16s, or head_dim signed bytes followed by their float32 scale (value =
// byte * scale; the largest |byte| of a row is 127).
#pragma once

#include <cstddef>
#include <cstdint>

namespace recycle {

// A new type also needs: write_cache() in cpu/attention.cpp; elements_per_word(), score(), load_values() and attend() in
// cpu/kernels/attention.h; attention() in cuda/attention.cu; bindings/check_arguments.h; decoding/kv_cache.py.
enum class CacheType : int32_t { f32 = 0, bf16 = 1, q8 = 2 };

inline constexpr int64_t kScaleBytes = 4;

constexpr int64_t cache_row_bytes(CacheType type, int64_t head_dim) {
  return type == CacheType::f32 ? head_dim * 4 : type == CacheType::bf16 ? head_dim * 2 : head_dim + kScaleBytes;
}

struct KvCache {
  std::byte* data = nullptr;
  CacheType type = CacheType::f32;
  int64_t n_sequences = 0;
  int64_t n_kv_heads = 0;
  int64_t capacity = 0;  // positions
  int64_t head_dim = 0;

  int64_t row_bytes() const { return cache_row_bytes(type, head_dim); }
  // Position 0 of one head: [capacity, row]. kv: 0 keys, 1 values.
  std::byte* head(int64_t layer, int64_t kv, int64_t sequence, int64_t kv_head) const {
    const int64_t index = ((layer * 2 + kv) * n_sequences + sequence) * n_kv_heads + kv_head;
    return data + index * capacity * row_bytes();
  }
};

}  // namespace recycle
