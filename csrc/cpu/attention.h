// The phases of attention. All threads of a team run each of them, with a barrier between one and the next.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "recycle/arena.h"
#include "recycle/kv_cache.h"
#include "recycle/parallel.h"
#include "rows.h"

namespace recycle {

struct AttentionShape {
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;

  int64_t q_size() const { return n_heads * head_dim; }
  int64_t kv_size() const { return n_kv_heads * head_dim; }
};

inline int64_t attend_tile_floats(int64_t n_rows, const AttentionShape& shape) {
  return attend_tile_floats(n_rows, shape.n_heads / shape.n_kv_heads, shape.head_dim);
}

// Arrays that the threads share. The caller fills q, k and v.
struct AttentionWork {
  float *q, *k, *v;        // [rows, q_size], [rows, kv_size] twice
  float *cos, *sin;        // [rows, head_dim / 2]
  float* weighted;         // [rows, n_heads, kSplits, head_dim]
  float *total, *maximum;  // [rows, n_heads, kSplits]

  // Room for either of two shapes.
  void take(Arena& arena, int64_t rows, const AttentionShape& a, const AttentionShape& b);
};

// work.cos and work.sin: of position * inv_freq for each row.
void rope_tables(const Team& team, const Rows& rows, const float* inv_freq, int64_t head_dim, AttentionWork& work);

// This thread's panels of v. For an 8-bit cache they are whole heads, because a head's row has one scale.
Range share_v(const Team& team, const AttentionShape& shape, CacheType type);

// Normalises (unless the norm is null) and rotates q and k of these heads (those of k are numbered after those of
// q), and writes their k, and these panels of v, to the cache. A thread passes the heads and panels that it computed
// itself, so no barrier comes before.
void rotate_and_append(Range heads, Range v_panels, const Rows& rows, const AttentionShape& shape, const float* q_norm,
                       const float* k_norm, float eps, const KvCache& cache, int64_t layer, AttentionWork& work);

// Fills weighted, total and maximum. tile: scratch of this thread, attend_tile_floats().
void attend_splits(const Team& team, const Rows& rows, const AttentionShape& shape, const KvCache& cache, int64_t layer,
                   AttentionWork& work, float* tile);

// Combines the splits of one row at `position`. out: [n_heads, head_dim].
void combine_row(const AttentionShape& shape, const AttentionWork& work, int64_t row, int64_t position, float* out);

}  // namespace recycle
