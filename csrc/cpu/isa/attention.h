// Grouped-query attention of a few query rows to the cache.
//
//   q [rows, group, head_dim] float32 (after RoPE), keys and values [positions, head_dim] float32 or
//   bfloat16  ->  weighted values, total weight and maximum of each (row, head), for one split
//
// Online softmax (Milakov and Gimelshein 2018) over chunks of 64 positions; splits are merged afterwards
// (Flash-Decoding). Bounded by the cache's bytes for one row once the context is long, if what is done for each
// byte stays little: of 16 keys at a time, positions are laid side by side once for all rows and heads, and a
// score is a running sum over head_dim in its own lane. Keys and values are widened in registers. The chunk that
// follows is asked for meanwhile.
// Rejected: scores as dot products along head_dim, whose horizontal sums cost as much as the products, for
// every head and row anew; widened copies of whole chunks, which with their sources fill the L1 cache.
// Which positions make a chunk and a split depends on positions alone, so a row's result doesn't depend
// on how many rows come with it.
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

constexpr int64_t values_a_word(CacheType type) {
  return type == CacheType::f32 ? 1 : type == CacheType::bf16 ? 2 : 4;
}

// Words (32 bits) of 16 keys, positions side by side: words [head_dim / values_a_word, 16]. From `count` on,
// keys are zero.
template <CacheType type>
inline void turn_keys(const std::byte* rows, int64_t count, int64_t head_dim,
                      const std::byte* ahead, float* words) {
  const int64_t row_bytes = cache_row_bytes(type, head_dim);
  const int64_t n_words = head_dim / values_a_word(type);
  for (int64_t first = 0; first < n_words; first += 16) {
    Raw lines[16];
    for (int64_t p = 0; p < 16; ++p) {
      const std::byte* line = rows + p * row_bytes + first * 4;
      fetch(ahead + p * row_bytes + first * 4);
      if (p < count && n_words - first >= 16) {
        lines[p] = load_raw(line);
        continue;
      }
      alignas(64) std::byte part[64] = {};
      if (p < count) __builtin_memcpy(part, line, (n_words - first) * 4);
      lines[p] = load_raw(part);
    }
    transpose(lines);
    for (int64_t w = 0; w < 16 && first + w < n_words; ++w)
      store(words + (first + w) * 16, as_floats(lines[w]));
  }
}

// scores[h] = q[h] . 16 keys, for H heads. Even and odd elements are summed apart. 8-bit keys count as integers.
template <CacheType type, int H>
inline void score(const float* q, const float* words, int64_t head_dim, float* scores) {
  Lanes even[H], odd[H];
  for (int h = 0; h < H; ++h) even[h] = odd[h] = splat(0);
  const auto add = [&](Lanes(&sums)[H], Lanes keys, int64_t d) {
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) sums[h] = fma(keys, splat(q[h * head_dim + d]), sums[h]);
  };
  for (int64_t d = 0; d < head_dim; d += 4) {
    if constexpr (type == CacheType::f32) {
      add(even, load(words + d * 16), d);
      add(odd, load(words + d * 16 + 16), d + 1);
      add(even, load(words + d * 16 + 32), d + 2);
      add(odd, load(words + d * 16 + 48), d + 3);
    } else if constexpr (type == CacheType::bf16) {
      const Raw first = load_raw(reinterpret_cast<const std::byte*>(words + d * 8));
      const Raw second = load_raw(reinterpret_cast<const std::byte*>(words + d * 8 + 16));
      add(even, bf16_even(first), d);
      add(odd, bf16_odd(first), d + 1);
      add(even, bf16_even(second), d + 2);
      add(odd, bf16_odd(second), d + 3);
    } else {
      const Raw four = load_raw(reinterpret_cast<const std::byte*>(words + d * 4));
      add(even, byte_of<0>(four), d);
      add(odd, byte_of<1>(four), d + 1);
      add(even, byte_of<2>(four), d + 2);
      add(odd, byte_of<3>(four), d + 3);
    }
  }
  for (int h = 0; h < H; ++h) store(scores + h * kChunk, RECYCLE_ISA::add(even[h], odd[h]));
}

// The scales of 8-bit rows.
inline void load_scales(const std::byte* rows, int64_t count, int64_t head_dim, float* scales) {
  for (int64_t p = 0; p < kChunk; ++p) scales[p] = 0;
  for (int64_t p = 0; p < count; ++p)
    __builtin_memcpy(scales + p, rows + p * (head_dim + kScaleBytes) + head_dim, kScaleBytes);
}

// One head's scores of a chunk, [kChunk], become weights relative to the running maximum, which they raise;
// returns the factor for what was summed up before. key_scales and value_scales: of 8-bit rows, or null.
inline float soften(int64_t length, float scale, const float* key_scales, const float* value_scales,
                    float* maximum, float* total, float* scores) {
  const int64_t padded = round_up(length, 16);
  for (int64_t p = 0; p < padded; p += 16) {
    Lanes scaled = mul(load(scores + p), splat(scale));
    if (key_scales != nullptr) scaled = mul(scaled, load(key_scales + p));
    store(scores + p, scaled);
  }
  for (int64_t p = length; p < padded; ++p) scores[p] = -__builtin_inff();
  Lanes largest = load(scores);
  for (int64_t p = 16; p < padded; p += 16) largest = max(largest, load(scores + p));
  const float chunk_maximum = max_of(largest);
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
  *total = *total * correction[0] + sum(chunk_total);
  return correction[0];
}

template <CacheType type>
inline Lanes load_values(const std::byte* row, int64_t i) {
  if constexpr (type == CacheType::f32)
    return load(reinterpret_cast<const float*>(row) + i);
  else if constexpr (type == CacheType::bf16)
    return load_bf16(row + i * 2);
  else
    return load_int8(row + i);
}

// weighted[h] = weighted[h] * correction[h] + weights[h] . values, for H heads and L x 16 elements from `first`.
template <CacheType type, int H, int L>
inline void add_values(const float* weights, const float* corrections, const std::byte* values,
                       int64_t length, int64_t row_bytes, const std::byte* ahead, int64_t first,
                       float* weighted, int64_t ld) {
  Lanes sums[H][L];
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l)
      sums[h][l] = mul(load(weighted + h * ld + first + l * 16), splat(corrections[h]));
  for (int64_t p = 0; p < length; ++p) {
    const std::byte* row = values + p * row_bytes;
    for (int l = 0; l < L; ++l) {
      const int64_t i = first + l * 16;
      const int64_t byte = i * 4 / values_a_word(type);
      if (byte % 64 == 0) fetch(ahead + p * row_bytes + byte);
      const Lanes value = load_values<type>(row, i);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h)
        sums[h][l] = fma(splat(weights[h * kChunk + p]), value, sums[h][l]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l) store(weighted + h * ld + first + l * 16, sums[h][l]);
}

template <CacheType type, int H>
inline void add_values(const float* weights, const float* corrections, const std::byte* values,
                       int64_t length, int64_t head_dim, const std::byte* ahead, float* weighted,
                       int64_t ld) {
  constexpr int L = lanes_for(H);
  const int64_t row_bytes = cache_row_bytes(type, head_dim);
  int64_t i = 0;
  for (; i + L * 16 <= head_dim; i += L * 16)
    add_values<type, H, L>(weights, corrections, values, length, row_bytes, ahead, i, weighted, ld);
  for (; i < head_dim; i += 16)
    add_values<type, H, 1>(weights, corrections, values, length, row_bytes, ahead, i, weighted, ld);
}

template <CacheType type>
class Attend {
 public:
  explicit Attend(const AttendTask& task)
      : task_(task),
        row_bytes_(cache_row_bytes(type, task.head_dim)),
        words_(task.tile),
        scores_(task.tile + task.head_dim * 16) {}

  void run() {
    const int64_t end = task_.first_position + task_.n_rows;  // positions the last row sees
    clear();
    for (int64_t begin = task_.split * kChunk; begin < end; begin += kSplits * kChunk) {
      const int64_t count = end - begin < kChunk ? end - begin : kChunk;
      const int64_t later = begin + kSplits * kChunk;
      const std::byte* keys = task_.keys + begin * row_bytes_;
      const std::byte* values = task_.values + begin * row_bytes_;
      const std::byte* next_keys = later < end ? task_.keys + later * row_bytes_ : task_.next_keys;
      const std::byte* next_values =
          later < end ? task_.values + later * row_bytes_ : task_.next_values;
      if constexpr (type == CacheType::q8) {
        load_scales(keys, count, task_.head_dim, key_scales_);
        load_scales(values, count, task_.head_dim, value_scales_);
      }
      for (int64_t p = 0; p < count; p += 16) {
        turn_keys<type>(keys + p * row_bytes_, count - p, task_.head_dim,
                        next_keys + p * row_bytes_, words_);
        by_heads([&]<int H>(int64_t r, int64_t g) {
          if (seen(r, begin) > p)
            score<type, H>(query(r, g), words_, task_.head_dim, scores(r, g) + p);
        });
      }
      by_heads([&]<int H>(int64_t r, int64_t g) {
        const int64_t visible = seen(r, begin);
        const int64_t length = visible < count ? visible : count;
        if (length <= 0) return;
        const bool is_q8 = type == CacheType::q8;
        float corrections[H];
        for (int h = 0; h < H; ++h)
          corrections[h] =
              soften(length, scale_, is_q8 ? key_scales_ : nullptr, is_q8 ? value_scales_ : nullptr,
                     maximum(r, g + h), total(r, g + h), scores(r, g + h));
        add_values<type, H>(scores(r, g), corrections, values, length, task_.head_dim, next_values,
                            weighted(r, g), kSplits * task_.head_dim);
      });
    }
  }

 private:
  // f<H>(row, first head) for all heads of all rows, H of them at a time.
  template <class F>
  void by_heads(F f) const {
    constexpr int kMost = heads_at_once();
    for (int64_t r = 0; r < task_.n_rows; ++r) {
      int64_t g = 0;
      for (; g + kMost <= task_.group; g += kMost) f.template operator()<kMost>(r, g);
      const int64_t left = task_.group - g;
      if (left == 1) f.template operator()<1>(r, g);
      if constexpr (kMost > 2)
        if (left == 2) f.template operator()<2>(r, g);
      if constexpr (kMost > 3)
        if (left == 3) f.template operator()<3>(r, g);
    }
  }

  void clear() {
    for (int64_t r = 0; r < task_.n_rows; ++r)
      for (int64_t g = 0; g < task_.group; ++g) {
        *maximum(r, g) = -__builtin_inff();
        *total(r, g) = 0;
        for (int64_t i = 0; i < task_.head_dim; i += 16) store(weighted(r, g) + i, splat(0));
      }
  }

  // Positions of the chunk at `begin` that row r sees; may be more than the chunk has, or less than 0.
  int64_t seen(int64_t r, int64_t begin) const { return task_.first_position + r + 1 - begin; }
  const float* query(int64_t r, int64_t g) const {
    return task_.q + r * task_.ld_q + g * task_.head_dim;
  }
  float* scores(int64_t r, int64_t g) const { return scores_ + (r * task_.group + g) * kChunk; }
  float* maximum(int64_t r, int64_t g) const {
    return task_.maximum + r * task_.ld_total + g * kSplits;
  }
  float* total(int64_t r, int64_t g) const {
    return task_.total + r * task_.ld_total + g * kSplits;
  }
  float* weighted(int64_t r, int64_t g) const {
    return task_.weighted + r * task_.ld_weighted + g * kSplits * task_.head_dim;
  }

  const AttendTask& task_;
  const int64_t row_bytes_;
  const float scale_ = 1 / __builtin_sqrtf(static_cast<float>(task_.head_dim));
  float* words_;   // [head_dim, 16]
  float* scores_;  // [rows, group, kChunk]
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

void merge_splits(const float* weighted, const float* total, const float* maximum, int64_t n_splits,
                  int64_t head_dim, float* out) {
  float largest = maximum[0];
  for (int64_t s = 1; s < n_splits; ++s) largest = maximum[s] > largest ? maximum[s] : largest;
  alignas(64) float factor[kSplits];
  for (int64_t s = 0; s < kSplits; ++s)
    factor[s] = s < n_splits ? maximum[s] - largest : -__builtin_inff();
  static_assert(kSplits == 16);
  store(factor, exp(load(factor)));
  float all = 0;
  for (int64_t s = 0; s < n_splits; ++s) all += factor[s] * total[s];
  const Lanes scale = splat(1 / all);
  for (int64_t i = 0; i < head_dim; i += 16) {
    Lanes value = splat(0);
    for (int64_t s = 0; s < n_splits; ++s)
      value = fma(splat(factor[s]), load(weighted + s * head_dim + i), value);
    store(out + i, mul(value, scale));
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
