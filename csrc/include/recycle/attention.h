// attention_decode: RoPE, append to the cache and grouped-query attention in one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/kv_cache.h"

namespace recycle {

struct AttentionParams {
  int64_t batch = 0;
  int64_t n_rows = 0;  // query rows of a sequence, at positions lengths[b] .. lengths[b] + n_rows - 1
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const float* q = nullptr;          // [batch, n_rows, n_heads, head_dim], before norm and RoPE
  const float* k = nullptr;          // [batch, n_rows, n_kv_heads, head_dim]
  const float* v = nullptr;          // [batch, n_rows, n_kv_heads, head_dim]
  const int64_t* lengths = nullptr;  // [batch] positions already in the cache
  const float* inv_freq = nullptr;   // [head_dim / 2]
  const float* q_norm = nullptr;     // [head_dim] or null (Qwen3)
  const float* k_norm = nullptr;     // likewise
  float eps = 0;
  KvCache cache;                 // one layer: [1, 2, batch, n_kv_heads, capacity, row]
  float* out = nullptr;          // [batch, n_rows, n_heads, head_dim]
  std::byte* scratch = nullptr;  // attention_scratch_bytes()
  int n_threads = 1;             // CPU only
};

int64_t attention_scratch_bytes(int64_t batch, int64_t n_rows, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                                int n_threads);
void attention_decode(const AttentionParams& params);

}  // namespace recycle
