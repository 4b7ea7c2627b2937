// The kernels of a decode step, one call each; every one is in a .cu file of its own. All arrays are in the GPU's
// memory. A call only starts a kernel: nothing waits, nothing is allocated.
#pragma once

#include "gemv.cuh"
#include "recycle/decode_step.h"

namespace recycle::cuda {

// Positions of the rows of each sequence, `width` rows a sequence, the first ones in use: -1 is an unused row.
struct RowMap {
  int batch = 0, width = 0;
  const int* positions = nullptr;  // [batch, width]

  int n() const { return batch * width; }
};

// Attention's inputs and work space.
struct AttentionArrays {
  float *q, *k, *v;        // [rows, q_size], [rows, kv_size] twice, as the products left them
  float* out;              // [rows, q_size]
  float* weighted;         // [splits, rows, q_size]
  float *total, *maximum;  // [splits, rows, n_heads]
  unsigned* arrived;       // [batch, n_kv_heads, query tiles] 0 between calls
};

struct AttentionCall {
  RowMap rows;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const float* inv_freq = nullptr;
  const float* q_norm = nullptr;  // null: none
  const float* k_norm = nullptr;
  float eps = 0;
  KvCache cache;
  int64_t layer = 0;
  AttentionArrays arrays;
};

// Parts of the cache that blocks attend to side by side.
inline constexpr int kSplits = 16;
// Queries (row, head of a group) that a block of attention works on together.
inline constexpr int kQueries = 8;
constexpr int query_tiles(int64_t width, int64_t group) {
  return static_cast<int>((width * group + kQueries - 1) / kQueries);
}

// q, k and v = W norm(x) (+ bias)
void project_qkv(Launcher& launcher, const Stack& stack, const Layer& layer, const Input& x,
                 const AttentionArrays& out);
// RoPE (and norms) of q and k, append to the cache, attention: arrays.out
void attend(Launcher& launcher, const AttentionCall& call);
// to [rows, n] = W x (+ bias), or to += W x
void project(Launcher& launcher, const Matrix& matrix, const float* bias, const Input& x, bool add,
             float* to);
// activation [rows, intermediate] = silu(gate norm(x)) * (up norm(x))
void gate_up(Launcher& launcher, const Stack& stack, const Layer& layer, const Input& x,
             float* activation);

// What the head found for each row: the best of each block's tokens.
struct HeadBests {
  float* value;  // [rows, blocks] NaN once a logit wasn't finite
  int* id;       // [rows, blocks]
  int blocks = 0;
};
// logits: [rows, n] or null. bests: filled in any case.
void scan_head(Launcher& launcher, const Matrix& head, const Input& x, float* logits,
               const HeadBests& bests);

}  // namespace recycle::cuda
