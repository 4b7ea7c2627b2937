// The kernels that exist once for each instruction set, as a table of functions. One source (kernels/*.h) is
// compiled for each set; dispatch.cpp chooses the table at run time.
#pragma once

#include <cstdint>

#include "recycle/format.h"
#include "recycle/kv_cache.h"

namespace recycle {

// Outputs (rows of W, not of x) of one gemm() call for each row of x; also the stride of its result.
inline constexpr int64_t kTileRows = kTilePanels * kPanelRows;

// Attention handles kChunk positions of the cache together, and divides the cache into kSplits parts that threads
// share (part s: chunks s, s + kSplits, ...). Both depend on positions alone: the order of operations of a row is
// the same for any number of threads. 64 positions: a head's bf16 keys and values are 16 KB at head_dim 64,
// and stay in L1.
// 16 splits: their factors are one vector in combine_splits(), and 3 key/value heads give 48 tasks to share.
inline constexpr int64_t kChunk = 64;
inline constexpr int64_t kSplits = 16;

// The running argmax of a row of logits: lane i has seen the ids i, i + 16, ...
struct ArgMax {
  float value[kPanelRows];
  int32_t id[kPanelRows];
  float nonfinite[kPanelRows];  // 0, or NaN after a NaN or an infinity
};

// Attention of some query rows to one split of the cache, for the query heads of one key/value head (its group).
// Results are unnormalized: weighted values, total weight, and the maximum that the weights are relative to.
struct AttendTask {
  const float* q = nullptr;  // [n_rows, ld_q], the first head of the group
  int64_t ld_q = 0;
  int64_t n_rows = 0, group = 0, head_dim = 0;
  int64_t first_position = 0;       // of row 0; row r sees positions 0 .. first_position + r
  const std::byte* keys = nullptr;  // [capacity, row], see kv_cache.h
  const std::byte* values = nullptr;
  const std::byte* next_keys = nullptr;  // what the calling thread reads next, to prefetch
  const std::byte* next_values = nullptr;
  CacheType type = CacheType::f32;
  int64_t split = 0;
  float* weighted = nullptr;  // row r, head g: + r * ld_weighted + g * kSplits * head_dim
  float* total = nullptr;     // row r, head g: + r * ld_total + g * kSplits
  float* maximum = nullptr;   // like total
  int64_t ld_weighted = 0, ld_total = 0;
  float* tile = nullptr;  // attend_tile_floats()
};

// Floats of AttendTask::tile: the transposed keys; and for each row and head of the group the query, a chunk's
// scores, the weighted values, their total and the maximum.
inline constexpr int64_t kMaxKeyBlocks = 2;  // of 16 keys
constexpr int64_t attend_tile_floats(int64_t n_rows, int64_t group, int64_t head_dim) {
  return 16 * kMaxKeyBlocks * head_dim + n_rows * group * (2 * head_dim + kChunk + 2);
}

// Rows as quantized matrices read them: as 16-bit integers (four in two words, in the order of the instruction set's
// dot products); for each block of 32 its scale, the sum of its rounded values, and minus the sum of its integers; the
// same sums for each 16. The rows stand one after the other, without gaps.
struct QuantizedRows {
  int32_t* quants = nullptr;           // [rows, k / 2]
  float* scales = nullptr;             // [rows, k / 32]
  float* sums = nullptr;               // [rows, k / 32]
  int32_t* minus_sums = nullptr;       // [rows, k / 32]
  float* half_sums = nullptr;          // [rows, k / 16]
  int32_t* minus_half_sums = nullptr;  // [rows, k / 16]
};

// The input rows of gemm(). Quantized matrices read the other arrays in place of x.
struct Activations : QuantizedRows {
  const float* x = nullptr;  // [rows, k]

  Activations from_row(int64_t row, int64_t k) const {
    const int64_t block = row * (k / kBlock);
    return {{quants + row * (k / 2), scales + block, sums + block, minus_sums + block, half_sums + 2 * block,
             minus_half_sums + 2 * block},
            x + row * k};
  }
};

struct Kernels {
  const char* name;

  // out[r][0 .. 16 * panels) = rows of `panels` panels from `panel` on, times x[r]. out: [rows, kTileRows].
  // next: the weights that the calling thread reads next, to prefetch.
  void (*gemm)(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x, int64_t rows,
               const std::byte* next, float* out);
  // Rounds x [n]. n: a multiple of 32.
  void (*quantize)(const float* x, int64_t n, const QuantizedRows& to);
  // out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). n: a multiple of 16. out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // out = gate * sigmoid(gate) * up (Shazeer 2020). n: a multiple of 16.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  void (*attend)(const AttendTask& task);
  // out = sum over splits of exp(maximum - max) * weighted, divided by the same sum of totals; max: of all splits.
  void (*combine_splits)(const float* weighted, const float* total, const float* maximum, int64_t n_splits,
                         int64_t head_dim, float* out);
  // Updates the running argmax with values [n] of the ids first_id, first_id + 1, ... first_id, and every n but the
  // last, are multiples of 16.
  void (*argmax)(const float* values, int64_t n, int64_t first_id, ArgMax* best);
  // The sum of `values`, read from end to end as gemm() reads weights. n: a multiple of 64.
  float (*read_stream)(const float* values, int64_t n);
  float (*max_value)(const float* values, int64_t n);
  // The sum of exp((values - maximum) * scale); out [n], unless null, receives the terms.
  float (*exp_sum)(const float* values, int64_t n, float maximum, float scale, float* out);
};

// The table in use: the best that this processor can run, unless force_isa() has chosen another.
const Kernels& kernels();
// "generic", "avx2", "avxvnni" or "avx512"; null: the best. False if this build or this processor lacks it. Waits for the
// parallel() that runs.
bool force_isa(const char* name);
// Instruction sets that this build has and this processor can run, best last; returns how many.
inline constexpr int kMaxIsas = 4;
int runnable_isas(const char* names[kMaxIsas]);

}  // namespace recycle
