// The kernels that exist once for each instruction set, as a table of functions. The same source
// (kernels/*.h) is compiled for each set; which table runs is decided once, at run time.
#pragma once

#include <cstdint>

#include "recycle/format.h"
#include "recycle/kv_cache.h"

namespace recycle {

// Outputs of one product() call: [rows, kTileRows].
inline constexpr int64_t kTileRows = kTilePanels * kPanelRows;

// Positions of the cache that attention handles together, and parts the cache is split in for
// parallelism (part s: chunks s, s + kSplits, ...). Both depend on nothing but the position: the
// order of operations of a row is the same whatever the threads.
inline constexpr int64_t kChunk = 64;
inline constexpr int64_t kSplits = 16;

// The running best of a row: lane i has seen the ids i, i + 16, ...
struct ArgMax {
  float value[kPanelRows];
  int32_t id[kPanelRows];
  float poison[kPanelRows];  // 0, or NaN once a NaN or an infinity was seen
};

// Attention of some query rows of one key/value head's group to one split of the cache. Results are
// unnormalised: weighted values, their total weight, and the maximum the weights refer to.
struct AttendTask {
  const float* q = nullptr;  // [n_rows, ld_q], the first head of the group
  int64_t ld_q = 0;
  int64_t n_rows = 0, group = 0, head_dim = 0;
  int64_t first_position = 0;       // of row 0; row r sees positions 0 .. first_position + r
  const std::byte* keys = nullptr;  // [capacity, row], see kv_cache.h
  const std::byte* values = nullptr;
  const std::byte* next_keys =
      nullptr;  // what the calling thread reads afterwards, for prefetching
  const std::byte* next_values = nullptr;
  CacheType type = CacheType::f32;
  int64_t split = 0;
  float* weighted = nullptr;  // row r, head g: + r * ld_weighted + g * kSplits * head_dim
  float* total = nullptr;     // row r, head g: + r * ld_total + g * kSplits
  float* maximum = nullptr;   // as total
  int64_t ld_weighted = 0, ld_total = 0;
  float* tile = nullptr;  // attend_tile_floats()
};

// Keys turned side by side; and for each row and head of the group the query, a chunk's scores, the weighted
// values, their total and the maximum.
inline constexpr int64_t kMostKeyBlocks = 2;  // of 16
constexpr int64_t attend_tile_floats(int64_t n_rows, int64_t group, int64_t head_dim) {
  return 16 * kMostKeyBlocks * head_dim + n_rows * group * (2 * head_dim + kChunk + 2);
}

// Rows that go into a product. The rest is read for quantised matrices only: the same rows as 16-bit
// integers, two words for each four of them, in the order that the instruction set's products want, and
// for each block of 32 its scale and the sum of the rounded values, as a number and as minus the integers'.
struct Activations {
  const float* x = nullptr;             // [rows, k]
  const int32_t* quants = nullptr;      // [rows, k / 2]
  const float* scales = nullptr;        // [rows, k / 32]
  const float* sums = nullptr;          // [rows, k / 32]
  const int32_t* minus_sums = nullptr;  // [rows, k / 32]

  Activations from_row(int64_t row, int64_t k) const {
    const int64_t block = row * (k / kBlock);
    return {x + row * k, quants + row * (k / 2), scales + block, sums + block, minus_sums + block};
  }
};

struct Kernels {
  const char* name;

  // out[r][0..16 panels) = x[r] . rows of `panels` panels from `panel` on. out: [rows, kTileRows].
  // next: the weights that the calling thread reads afterwards, for prefetching.
  void (*product)(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x,
                  int64_t rows, const std::byte* next, float* out);
  // x [n] -> the other arrays of Activations. n: a multiple of 32.
  void (*quantise)(const float* x, int64_t n, int32_t* quants, float* scales, float* sums,
                   int32_t* minus_sums);
  // out = x / sqrt(mean(x^2) + eps) * weight. n: a multiple of 16. In place is fine.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // out = gate * sigmoid(gate) * up
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  void (*attend)(const AttendTask& task);
  // out = sum over splits of exp(maximum - best) * weighted, over the same sum of totals.
  void (*merge_splits)(const float* weighted, const float* total, const float* maximum,
                       int64_t n_splits, int64_t head_dim, float* out);
  // Takes values[0..n) with ids first_id.. into account. first_id and all but the last n: multiples of 16.
  void (*argmax)(const float* values, int64_t n, int64_t first_id, ArgMax* best);
  // The sum of `values`, read from end to end as product() reads weights. n: a multiple of 64.
  float (*read_stream)(const float* values, int64_t n);
  float (*max_value)(const float* values, int64_t n);
  // Sum of exp((values - maximum) * scale); each term also goes to `out` unless that is null.
  float (*exp_sum)(const float* values, int64_t n, float maximum, float scale, float* out);
};

// The table in use: the best this processor can run, or the one chosen by force_isa().
const Kernels& kernels();
// "generic", "avx2" or "avx512"; false if this build or this processor doesn't have it. Null: the best.
bool force_isa(const char* name);
// Names this build has and this processor can run, best last.
int runnable_isas(const char* names[3]);

}  // namespace recycle
