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

inline AttentionShape attention_shape(const Stack& stack) { return {stack.n_heads, stack.n_kv_heads, stack.head_dim}; }

// The arrays that one thread uses alone.
struct ThreadScratch {
  float* input;             // [rows, widest input of a matmul]
  QuantizedRows quantized;  // for the widest input
  float *tile, *tile2;      // [rows, kTileRows]
  float* attend_tile;

  void take(Arena& arena, int64_t rows, int64_t widest);
  // x [rows, k] as an input of matmuls with these formats.
  Activations activations(const float* x, int64_t rows, int64_t k, std::initializer_list<Format> formats) const;
};

// What the layers work on; shared by the threads, except `threads`.
struct ForwardWork {
  float* x;  // [rows, hidden] the residual stream: embeddings in, last layer's output out
  AttentionWork attention;
  float* activation;  // [rows, intermediate]
  ThreadScratch threads[kMaxThreads];

  // Room for `rows` rows through either stack, and for matmuls with 2 hidden inputs.
  void take(Arena& arena, int64_t rows, const Stack& a, const Stack& b, int n_threads);
};

// The linear layer y = W x for some panels of W. epilogue(row, first output, count, values) receives the outputs, for
// each row and each tile; `first output` and count are multiples of 16, zero rows of the last panel included. Only the LM
// head has other sizes (plan.cpp checks), and its epilogue trims them. next: what this thread reads next.
template <class Epilogue>
void linear(const Matrix& matrix, Range panels, const Activations& x, int64_t rows, const ThreadScratch& scratch,
            const std::byte* next, Epilogue epilogue) {
  for (int64_t panel = panels.begin; panel < panels.end; panel += kTilePanels) {
    const int64_t left = panels.end - panel;
    const int64_t count = left < kTilePanels ? left : kTilePanels;
    kernels().gemm(matrix, panel, count, x, rows, count == left ? next : matrix.panel(panel + count), scratch.tile);
    for (int64_t row = 0; row < rows; ++row)
      epilogue(row, panel * kPanelRows, count * kPanelRows, scratch.tile + row * kTileRows);
  }
}

// out [rows, matrix.n] = W x + bias for some panels of W. bias: null for none.
inline void linear_bias(const Matrix& matrix, const float* bias, Range panels, const Activations& x, int64_t rows,
                        const ThreadScratch& scratch, const std::byte* next, float* out) {
  linear(matrix, panels, x, rows, scratch, next, [&](int64_t row, int64_t n, int64_t count, const float* values) {
    float* to = out + row * matrix.n + n;
    for (int64_t i = 0; i < count; ++i) to[i] = bias != nullptr ? values[i] + bias[n + i] : values[i];
  });
}

// Runs the stack over the rows; all threads call it. work.x and the RoPE tables are ready before. It returns after a
// barrier: the rows' keys and values are then in the cache, and work.x is the output. next: what this thread reads
// next.
void forward(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows, const std::byte* next,
             ForwardWork& work);

// What this thread reads first in forward(), with caches of this type.
const std::byte* first_weights(const Team& team, const Stack& stack, CacheType type);

}  // namespace recycle
