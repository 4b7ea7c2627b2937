// A stack of transformer layers over some rows: the base model's, or the module's.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "attention.h"
#include "kernels.h"
#include "recycle/arena.h"
#include "recycle/kv_cache.h"
#include "recycle/model.h"
#include "recycle/parallel.h"
#include "rows.h"

namespace recycle {

inline AttentionShape attention_shape(const Stack& stack) {
  return {stack.n_heads, stack.n_kv_heads, stack.head_dim};
}

// One thread's own arrays.
struct ThreadWork {
  float* input;     // [rows, widest product input]
  int32_t* quants;  // what Activations has beside the floats, for the widest
  float *scales, *sums;
  int32_t* minus_sums;
  float *tile, *tile2;  // [rows, kTileRows]
  float* attend_tile;

  void take(Arena& arena, int64_t rows, int64_t widest);
  // x [rows, k] as the product with these matrices takes it.
  Activations activations(const float* x, int64_t rows, int64_t k,
                          std::initializer_list<Format> formats) const;
};

// What the layers work on; shared by the threads but for `threads`.
struct ForwardWork {
  float* x;  // [rows, hidden] the residual stream: embeddings in, last layer's output out
  AttentionWork attention;
  float* activation;  // [rows, intermediate]
  ThreadWork threads[kMaxThreads];

  // Room for `rows` rows through either stack, and for products with 2 hidden inputs.
  void take(Arena& arena, int64_t rows, const Stack& a, const Stack& b, int n_threads);
};

// out(row, first output, 16-aligned count, values) is called for each row and tile of the product of
// x with panels [range.begin, range.end). then: what this thread reads next.
template <class Out>
void product_tiles(const Matrix& matrix, Range panels, const Activations& x, int64_t rows,
                   const ThreadWork& own, const std::byte* then, Out out) {
  for (int64_t panel = panels.begin; panel < panels.end; panel += kTilePanels) {
    const int64_t left = panels.end - panel;
    const int64_t count = left < kTilePanels ? left : kTilePanels;
    kernels().product(matrix, panel, count, x, rows,
                      count == left ? then : matrix.panel(panel + count), own.tile);
    for (int64_t row = 0; row < rows; ++row)
      out(row, panel * kPanelRows, count * kPanelRows, own.tile + row * kTileRows);
  }
}

// Every thread of the team calls this; work.x and the RoPE tables are ready. The rows' keys and values are
// in the cache and work.x is the output when it returns (after a barrier). then: what this thread reads next.
void forward(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows,
             const std::byte* then, ForwardWork& work);

// What this thread reads first in forward(), with caches of this type.
const std::byte* first_weights(const Team& team, const Stack& stack, CacheType type);

}  // namespace recycle
