// Grouped-query attention of a few query rows to the cache.
//
//   q [rows, group, head_dim] float32 (after RoPE), keys and values [positions, head_dim] in the cache's type
//   ->  weighted values, total weight and maximum of each (row, head), for one split of the cache
//
// Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over chunks of 64 positions; the splits are
// combined afterwards (Flash-Decoding). One row is bounded by the cache's bytes, two rows or more by
// multiplications, so little may be done for each byte:
//   keys are transposed, 16 positions side by side, once for all heads of all rows; a score is then a running
//     sum over head_dim in its own lane
//   keys and values are widened in registers, once for all heads whose sums fit there
//   the next chunk is prefetched meanwhile
// Chunks and splits depend on positions alone, so the result of a row does not depend on the other rows.
//
// Tried and rejected:
//   scores as dot products along head_dim: the horizontal sums cost as much as the multiplications, for every
//     head and row anew
//   widened copies of whole chunks: with their sources they fill the L1 cache
//   integer queries for 8-bit keys: 5 to 9% faster, 150 times the error
#pragma once

#include "elementwise.h"
#include "prefetch.h"

namespace recycle::RECYCLE_ISA {
namespace {

// Elements of a cache row in 32 bits.
constexpr int64_t elements_per_word(CacheType type) {
  return type == CacheType::f32 ? 1 : type == CacheType::bf16 ? 2 : 4;
}

// Transposes 16 keys: words [head_dim / elements_per_word, 16] has the positions side by side. Keys from `count`
// on are zero. next: keys to prefetch.
template <CacheType type>
inline void transpose_keys(const std::byte* rows, int64_t count, int64_t head_dim, const std::byte* next,
                           float* words) {
  const int64_t row_bytes = cache_row_bytes(type, head_dim);
  const int64_t n_words = head_dim / elements_per_word(type);
  for (int64_t first = 0; first < n_words; first += 16) {
    Raw lines[16];
    const auto put = [&](int64_t w) { store(words + (first + w) * 16, as_floats(lines[w])); };
    if (count >= 16 && n_words - first >= 16) {
      // Constant loop counts keep all lines in registers.
#pragma GCC unroll 16
      for (int64_t p = 0; p < 16; ++p) {
        lines[p] = load_raw(rows + p * row_bytes + first * 4);
        prefetch_l2(next + p * row_bytes + first * 4);
      }
      transpose(lines);
#pragma GCC unroll 16
      for (int64_t w = 0; w < 16; ++w) put(w);
      continue;
    }
    const int64_t present = n_words - first < 16 ? n_words - first : 16;
    for (int64_t p = 0; p < 16; ++p) {
      alignas(64) std::byte part[64] = {};
      if (p < count) __builtin_memcpy(part, rows + p * row_bytes + first * 4, present * 4);
      lines[p] = load_raw(part);
    }
    transpose(lines);
    for (int64_t w = 0; w < present; ++w) put(w);
  }
}

// scores[h] = q[h] . keys, for H heads and B blocks of 16 keys; words [B, head_dim / elements_per_word, 16]. Even
// and odd elements have sums of their own. 8-bit keys count as integers: their scale comes later.
template <CacheType type, int H, int B>
inline void score(const float* q, const float* words, int64_t head_dim, float* scores) {
  const int64_t block = head_dim / elements_per_word(type) * 16;
  Lanes even[H][B], odd[H][B];
  for (int h = 0; h < H; ++h)
    for (int b = 0; b < B; ++b) even[h][b] = odd[h][b] = splat(0);
  // Adds the products of elements d and d + 1; widen(words of a block) gives them as floats.
  const auto add_two = [&](int64_t d, auto widen) {
    Lanes first[B], second[B];
    for (int b = 0; b < B; ++b) widen(words + b * block, first[b], second[b]);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
      for (int b = 0; b < B; ++b) even[h][b] = fma(first[b], splat(q[h * head_dim + d]), even[h][b]);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
      for (int b = 0; b < B; ++b) odd[h][b] = fma(second[b], splat(q[h * head_dim + d + 1]), odd[h][b]);
  };
  if constexpr (type == CacheType::f32) {
    for (int64_t d = 0; d < head_dim; d += 2)
      add_two(d, [&](const float* at, Lanes& first, Lanes& second) {
        first = load(at + d * 16);
        second = load(at + d * 16 + 16);
      });
  } else if constexpr (type == CacheType::bf16) {
    for (int64_t d = 0; d < head_dim; d += 2)
      add_two(d, [&](const float* at, Lanes& first, Lanes& second) {
        const Raw raw = load_raw(reinterpret_cast<const std::byte*>(at + d * 8));
        first = bf16_even(raw);
        second = bf16_odd(raw);
      });
  } else {
    for (int64_t d = 0; d < head_dim; d += 4) {
      const auto four = [&](const float* at) { return load_raw(reinterpret_cast<const std::byte*>(at + d * 4)); };
      add_two(d, [&](const float* at, Lanes& first, Lanes& second) {
        first = byte_of<0>(four(at));
        second = byte_of<1>(four(at));
      });
      add_two(d + 2, [&](const float* at, Lanes& first, Lanes& second) {
        first = byte_of<2>(four(at));
        second = byte_of<3>(four(at));
      });
    }
  }
  for (int h = 0; h < H; ++h)
    for (int b = 0; b < B; ++b) store(scores + h * kChunk + b * 16, add(even[h][b], odd[h][b]));
}

// The scales of a chunk's 8-bit rows; those from `count` on are 0.
inline void load_scales(const std::byte* rows, int64_t count, int64_t head_dim, float* scales) {
  for (int64_t p = 0; p < kChunk; ++p) scales[p] = 0;
  for (int64_t p = 0; p < count; ++p)
    __builtin_memcpy(scales + p, rows + p * (head_dim + kScaleBytes) + head_dim, kScaleBytes);
}

// Turns one head's scores of a chunk, [kChunk], into weights exp(score - maximum), and raises the running maximum
// and total. Returns the factor that corrects the sums of earlier chunks to the new maximum. key_scales and
// value_scales: those of 8-bit rows, or null.
inline float online_softmax_update(int64_t length, float scale, const float* key_scales, const float* value_scales,
                                   float* maximum, float* total, float* scores) {
  const int64_t padded = round_up(length, 16);
  for (int64_t p = 0; p < padded; p += 16) {
    Lanes scaled = mul(load(scores + p), splat(scale));
    if (key_scales != nullptr) scaled = mul(scaled, load(key_scales + p));
    store(scores + p, scaled);
  }
  for (int64_t p = length; p < padded; ++p) scores[p] = -__builtin_inff();
  Lanes maxima = load(scores);
  for (int64_t p = 16; p < padded; p += 16) maxima = max(maxima, load(scores + p));
  const float chunk_maximum = reduce_max(maxima);
  const float new_maximum = chunk_maximum > *maximum ? chunk_maximum : *maximum;
  Lanes chunk_total = splat(0);
  for (int64_t p = 0; p < padded; p += 16) {
    const Lanes weight = exp(sub(load(scores + p), splat(new_maximum)));
    chunk_total = add(chunk_total, weight);
    store(scores + p, value_scales != nullptr ? mul(weight, load(value_scales + p)) : weight);
  }
  alignas(64) float correction[16];
  store(correction, exp(splat(*maximum - new_maximum)));
  *maximum = new_maximum;
  *total = *total * correction[0] + reduce_add(chunk_total);
  return correction[0];
}

// Elements i .. i + 31 of a row of values. bfloat16 gives the even elements, then the odd ones, which takes half
// the instructions; Attend::write_results() restores the order.
template <CacheType type>
inline void load_values(const std::byte* row, int64_t i, Lanes (&values)[2]) {
  if constexpr (type == CacheType::f32) {
    values[0] = load(reinterpret_cast<const float*>(row) + i);
    values[1] = load(reinterpret_cast<const float*>(row) + i + 16);
  } else if constexpr (type == CacheType::bf16) {
    const Raw raw = load_raw(row + i * 2);
    values[0] = bf16_even(raw);
    values[1] = bf16_odd(raw);
  } else {
    values[0] = load_int8(row + i);
    values[1] = load_int8(row + i + 16);
  }
}

// Elements i .. i + 15: the last ones, if head_dim is no multiple of 32.
template <CacheType type>
inline void load_values(const std::byte* row, int64_t i, Lanes (&values)[1]) {
  if constexpr (type == CacheType::f32)
    values[0] = load(reinterpret_cast<const float*>(row) + i);
  else if constexpr (type == CacheType::bf16)
    values[0] = load_bf16(row + i * 2);
  else
    values[0] = load_int8(row + i);
}

// Positions [begin, end) of a chunk's values, and the values to prefetch.
struct Values {
  const std::byte* rows;
  const std::byte* next;
  int64_t row_bytes, head_dim, begin, end;
};

// weighted[h] = weighted[h] * correction[h] + weights[h] . values, for H heads and L vectors of 16 elements from
// element i on; `step` vectors are loaded together.
template <CacheType type, int H, int L, int step>
inline void accumulate_values(const float* weights, const float* corrections, const Values& values, int64_t i,
                              float* weighted) {
  Lanes sums[H][L];
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l)
      sums[h][l] = mul(load(weighted + h * values.head_dim + i + l * 16), splat(corrections[h]));
  for (int64_t p = values.begin; p < values.end; ++p) {
    const std::byte* row = values.rows + p * values.row_bytes;
#pragma GCC unroll 4
    for (int l = 0; l < L; l += step) {
      const int64_t byte = (i + l * 16) * 4 / elements_per_word(type);
      if (byte % 64 == 0) prefetch_l2(values.next + p * values.row_bytes + byte);
      Lanes loaded[step];
      load_values<type>(row, i + l * 16, loaded);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h)
        for (int s = 0; s < step; ++s) sums[h][l + s] = fma(splat(weights[h * kChunk + p]), loaded[s], sums[h][l + s]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l) store(weighted + h * values.head_dim + i + l * 16, sums[h][l]);
}

template <CacheType type, int H>
inline void accumulate_values(const float* weights, const float* corrections, const Values& values, float* weighted) {
  constexpr int L = value_vectors(H);
  int64_t i = 0;
  for (; i + L * 16 <= values.head_dim; i += L * 16)
    accumulate_values<type, H, L, 2>(weights, corrections, values, i, weighted);
  for (; i + 32 <= values.head_dim; i += 32)
    accumulate_values<type, H, 2, 2>(weights, corrections, values, i, weighted);
  if (i < values.head_dim) accumulate_values<type, H, 1, 1>(weights, corrections, values, i, weighted);
}

template <CacheType type>
class Attend {
 public:
  explicit Attend(const AttendTask& task)
      : task_(task), n_heads_(task.n_rows * task.group), row_bytes_(cache_row_bytes(type, task.head_dim)) {
    float* tile = task.tile;
    const auto take = [&](int64_t floats) {
      float* taken = tile;
      tile += floats;
      return taken;
    };
    words_ = take(16 * kMaxKeyBlocks * task.head_dim);
    queries_ = take(n_heads_ * task.head_dim);
    scores_ = take(n_heads_ * kChunk);
    weighted_ = take(n_heads_ * task.head_dim);
    totals_ = take(n_heads_);
    maxima_ = take(n_heads_);
  }

  void run() {
    const int64_t end = task_.first_position + task_.n_rows;  // positions the last row sees
    initialise();
    for (int64_t begin = task_.split * kChunk; begin < end; begin += kSplits * kChunk) {
      const int64_t count = end - begin < kChunk ? end - begin : kChunk;
      const int64_t later = begin + kSplits * kChunk;
      const std::byte* keys = task_.keys + begin * row_bytes_;
      const std::byte* next_keys = later < end ? task_.keys + later * row_bytes_ : task_.next_keys;
      Values values;
      values.rows = task_.values + begin * row_bytes_;
      values.next = later < end ? task_.values + later * row_bytes_ : task_.next_values;
      values.row_bytes = row_bytes_;
      values.head_dim = task_.head_dim;
      if constexpr (type == CacheType::q8) {
        load_scales(keys, count, task_.head_dim, key_scales_);
        load_scales(values.rows, count, task_.head_dim, value_scales_);
      }
      constexpr int B = key_blocks();
      static_assert(B <= kMaxKeyBlocks);
      for (int64_t p = 0; p < count; p += 16 * B) {
        for (int b = 0; b < B; ++b) {
          const int64_t first = p + b * 16;
          transpose_keys<type>(keys + first * row_bytes_, count - first, task_.head_dim, next_keys + first * row_bytes_,
                               words_ + b * 16 * task_.head_dim / elements_per_word(type));
        }
        for_head_tiles([&]<int H>(int64_t head) {
          if (visible_from(head + H - 1, begin) > p)
            score<type, H, B>(queries_ + head * task_.head_dim, words_, task_.head_dim, scores_ + head * kChunk + p);
        });
      }
      for_head_tiles([&]<int H>(int64_t head) { add_chunk<H>(head, begin, count, values); });
    }
    write_results();
  }

 private:
  // Adds a chunk to the results of H heads. A later row sees more positions than an earlier one: the positions that
  // all H see are done together, the rest head by head.
  template <int H>
  void add_chunk(int64_t head, int64_t begin, int64_t count, Values values) {
    const bool is_q8 = type == CacheType::q8;
    int64_t lengths[H];
    float corrections[H];
    for (int h = 0; h < H; ++h) {
      const int64_t visible = visible_from(head + h, begin);
      lengths[h] = visible < 0 ? 0 : visible < count ? visible : count;
      corrections[h] = lengths[h] == 0 ? 1.0f
                                       : online_softmax_update(lengths[h], scale_, is_q8 ? key_scales_ : nullptr,
                                                               is_q8 ? value_scales_ : nullptr, maxima_ + head + h,
                                                               totals_ + head + h, scores_ + (head + h) * kChunk);
    }
    values.begin = 0;
    values.end = lengths[0];
    accumulate_values<type, H>(scores_ + head * kChunk, corrections, values, weighted_ + head * task_.head_dim);
    values.begin = lengths[0];
    for (int h = 1; h < H; ++h) {
      if (lengths[h] == lengths[0]) continue;
      constexpr float kCorrected = 1;
      values.end = lengths[h];
      accumulate_values<type, 1>(scores_ + (head + h) * kChunk, &kCorrected, values,
                                 weighted_ + (head + h) * task_.head_dim);
    }
  }

  // f<H>(first head) for all heads of all rows, in as few tiles as registers allow, of nearly equal size.
  template <class F>
  void for_head_tiles(F f) const {
    const int64_t tiles = (n_heads_ + max_heads() - 1) / max_heads();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t head = n_heads_ * tile / tiles;
      dispatch_heads<1>(n_heads_ * (tile + 1) / tiles - head, head, f);
    }
  }
  template <int H, class F>
  static void dispatch_heads(int64_t count, int64_t head, F f) {
    if (count == H)
      f.template operator()<H>(head);
    else if constexpr (H < max_heads())
      dispatch_heads<H + 1>(count, head, f);
  }

  void initialise() {
    for (int64_t head = 0; head < n_heads_; ++head) {
      const float* q = task_.q + head / task_.group * task_.ld_q + head % task_.group * task_.head_dim;
      for (int64_t i = 0; i < task_.head_dim; i += 16) {
        store(queries_ + head * task_.head_dim + i, load(q + i));
        store(weighted_ + head * task_.head_dim + i, splat(0));
      }
      maxima_[head] = -__builtin_inff();
      totals_[head] = 0;
    }
  }

  // Copies the results to the task's arrays, with the elements in the model's order.
  void write_results() const {
    const int64_t end_of_pairs = type == CacheType::bf16 ? task_.head_dim / 32 * 32 : 0;
    for (int64_t head = 0; head < n_heads_; ++head) {
      const int64_t r = head / task_.group;
      const int64_t g = head % task_.group;
      task_.maximum[r * task_.ld_total + g * kSplits] = maxima_[head];
      task_.total[r * task_.ld_total + g * kSplits] = totals_[head];
      const float* from = weighted_ + head * task_.head_dim;
      float* to = task_.weighted + r * task_.ld_weighted + g * kSplits * task_.head_dim;
      for (int64_t i = 0; i < end_of_pairs; i += 32)
        for (int64_t j = 0; j < 16; ++j) {
          to[i + 2 * j] = from[i + j];
          to[i + 2 * j + 1] = from[i + 16 + j];
        }
      for (int64_t i = end_of_pairs; i < task_.head_dim; i += 16) store(to + i, load(from + i));
    }
  }

  // How many positions from `begin` on the head's row sees; may be negative, or more than a chunk.
  int64_t visible_from(int64_t head, int64_t begin) const {
    return task_.first_position + head / task_.group + 1 - begin;
  }

  const AttendTask& task_;
  const int64_t n_heads_;  // heads of the group times rows; the heads of a row follow each other
  const int64_t row_bytes_;
  const float scale_ = 1 / __builtin_sqrtf(static_cast<float>(task_.head_dim));
  float* queries_;           // [heads, head_dim]
  float* words_;             // [key_blocks(), head_dim / elements_per_word, 16]
  float* scores_;            // [heads, kChunk]
  float* weighted_;          // [heads, head_dim], in the order of load_values()
  float *totals_, *maxima_;  // [heads]
  alignas(64) float key_scales_[kChunk];
  alignas(64) float value_scales_[kChunk];
};

void attend(const AttendTask& task) {
  switch (task.type) {
    case CacheType::f32:
      return Attend<CacheType::f32>(task).run();
    case CacheType::bf16:
      return Attend<CacheType::bf16>(task).run();
    case CacheType::q8:
      return Attend<CacheType::q8>(task).run();
  }
}

void combine_splits(const float* weighted, const float* total, const float* maximum, int64_t n_splits, int64_t head_dim,
                    float* out) {
  float max = maximum[0];
  for (int64_t s = 1; s < n_splits; ++s) max = maximum[s] > max ? maximum[s] : max;
  alignas(64) float factor[kSplits];
  for (int64_t s = 0; s < kSplits; ++s) factor[s] = s < n_splits ? maximum[s] - max : -__builtin_inff();
  static_assert(kSplits == 16);
  store(factor, exp(load(factor)));
  float all = 0;
  for (int64_t s = 0; s < n_splits; ++s) all += factor[s] * total[s];
  const Lanes scale = splat(1 / all);
  for (int64_t i = 0; i < head_dim; i += 16) {
    Lanes value = splat(0);
    for (int64_t s = 0; s < n_splits; ++s) value = fma(splat(factor[s]), load(weighted + s * head_dim + i), value);
    store(out + i, mul(value, scale));
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
