// The kernels of a decode step: one function a .cu file. All arrays are in the GPU's memory. A function launches its
// kernel and returns; nothing waits for the GPU, nothing is allocated.
#pragma once

#include "launch.h"
#include "recycle/arena.h"
#include "recycle/decode_step.h"

namespace recycle::cuda {

// ---- GEMV: matrix times a few rows (gemv.cuh) ---------------------------------------------------------

// x of a GEMV. Row r is row r of x, or row row_indices[r].
struct GemvInput {
  const float* x = nullptr;  // [., k]
  const int* row_indices = nullptr;
  int n_rows = 0;
  const float* norm = nullptr;  // [k] weights of an RMSNorm of each row; null: no norm
  float eps = 0;

  // A kernel for R rows may get fewer: rows past n_rows repeat the last one, so loads stay in bounds, and their
  // results are dropped.
  RECYCLE_DEVICE const float* row(int r, int64_t k) const {
    const int clamped = r < n_rows ? r : n_rows - 1;
    return x + (row_indices != nullptr ? row_indices[clamped] : clamped) * k;
  }
};

// Blocks of a GEMV's grid: at most four for each multiprocessor, which then loop over the tiles.
inline int gemv_blocks(const Device& device, int64_t n_tiles) {
  const int64_t max_blocks = int64_t{device.multiprocessors} * 4;
  return static_cast<int>(n_tiles < max_blocks ? n_tiles : max_blocks);
}

// q [rows, q_size], k and v [rows, kv_size] = W norm(x) (+ bias)
void qkv(Launcher& launcher, const Stack& stack, const Layer& layer, const GemvInput& x, float* q, float* k, float* v);
// out [rows, n] = W x (+ bias); out += W x (+ bias) where `accumulate`
void linear(Launcher& launcher, const Matrix& weight, const float* bias, const GemvInput& x, bool accumulate,
            float* out);
// out [rows, intermediate] = silu(gate norm(x)) * (up norm(x))
void gate_up(Launcher& launcher, const Stack& stack, const Layer& layer, const GemvInput& x, float* out);

// A running argmax. The lowest token wins among equal values.
struct Argmax {
  float value = -INFINITY;
  int token = 0;
  float nonfinite = 0;  // 0; NaN once a logit was NaN or infinite

  RECYCLE_DEVICE void combine(float other_value, int other_token) {
    if (other_value > value || (other_value == value && other_token < token)) {
      value = other_value;
      token = other_token;
    }
  }
  // Over neighbouring threads of a warp, to all of them.
  RECYCLE_DEVICE void reduce(int n_threads) {
    for (int mask = n_threads / 2; mask > 0; mask /= 2) {
      const float other_value = shuffle_xor(value, mask);
      const int other_token = shuffle_xor(token, mask);
      nonfinite += shuffle_xor(nonfinite, mask);
      combine(other_value, other_token);
    }
  }
};

// The argmax of each row and block of the LM head: argmax() in sampling.h reduces the blocks.
struct PartialArgmax {
  float* value = nullptr;  // [rows, blocks]; NaN once a logit of the block is nonfinite
  int* token = nullptr;    // [rows, blocks]
  int blocks = 0;

  void take(Arena& arena, const Device& device, int64_t rows, const Matrix& head) {
    blocks = gemv_blocks(device, n_panels(head.n));
    value = arena.take<float>(rows * blocks);
    token = arena.take<int>(rows * blocks);
  }
};
// logits [rows, n] = W norm(x), unless logits is null; partial: always.
void lm_head(Launcher& launcher, const Matrix& weight, const GemvInput& x, float* logits, const PartialArgmax& partial);

// ---- Attention (attention.cu) -------------------------------------------------------------------------

// The rows of a step, rows_per_sequence for each sequence, the used rows first.
struct RowMap {
  int batch = 0, rows_per_sequence = 0;
  const int* positions = nullptr;  // [batch, rows_per_sequence]; -1: an unused row

  constexpr int n_rows() const { return batch * rows_per_sequence; }
};

// Blocks that share the cache of one key/value head.
inline constexpr int kSplits = 16;
// Queries (row, head of a group) that one block attends for.
inline constexpr int kQueries = 8;
constexpr int query_tiles(int64_t rows_per_sequence, int64_t group) {
  return static_cast<int>((rows_per_sequence * group + kQueries - 1) / kQueries);
}

struct AttentionBuffers {
  const float *q, *k, *v;        // [rows, q_size], [rows, kv_size] twice: before norm and RoPE
  float* out;                    // [rows, q_size]
  float* split_out;              // [splits, rows, q_size] sum of exp(score - max) * v
  float *split_sum, *split_max;  // [splits, rows, n_heads] sum of exp(score - max); max score
  unsigned* blocks_done;         // [batch, n_kv_heads, query tiles]; 0 between calls

  void take_splits(Arena& arena, int64_t rows, int64_t q_size, int64_t n_heads, int64_t counters) {
    split_out = arena.take<float>(kSplits * rows * q_size);
    split_sum = arena.take<float>(kSplits * rows * n_heads);
    split_max = arena.take<float>(kSplits * rows * n_heads);
    blocks_done = arena.take<unsigned>(counters);
  }
};

struct AttentionKernelParams {
  RowMap rows;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const float* inv_freq = nullptr;
  const float* q_norm = nullptr;  // null: no norm
  const float* k_norm = nullptr;
  float eps = 0;
  KvCache cache;
  int64_t layer = 0;
  AttentionBuffers buffers;
};

// buffers.out = attention, with RoPE (and norms) of q and k; appends k and v to the cache.
void attention(Launcher& launcher, const AttentionKernelParams& params);

}  // namespace recycle::cuda
