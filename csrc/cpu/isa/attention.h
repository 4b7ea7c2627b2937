// Grouped-query attention of a few query rows to the cache.
//
//   q [rows, group, head_dim] float32 (after RoPE), keys and values [positions, head_dim] float32 or
//   bfloat16  ->  weighted values, total weight and maximum of each (row, head), for one split
//
// Online softmax (Milakov and Gimelshein 2018) over chunks of 64 positions; splits are merged afterwards
// (Flash-Decoding). Bounded by the cache's bytes for one row once the context is long. A chunk in fewer bits is
// widened once for all heads and rows of the group. Scores are made 16 positions at a time, because 16
// horizontal sums together cost a third of 16 alone; weighted values for all heads of a group at once,
// because one head's four sums would wait for their own additions.
// Which positions make a chunk and a split depends on positions alone, so a row's result doesn't depend
// on how many rows come with it.
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

const float* widen(const std::byte* rows, CacheType type, int64_t count, int64_t head_dim,
                   float* tile) {
  if (type == CacheType::f32) return reinterpret_cast<const float*>(rows);
  if (type == CacheType::bf16) {
    for (int64_t i = 0; i < count * head_dim; i += 16) store(tile + i, load_bf16(rows + i * 2));
    return tile;
  }
  for (int64_t p = 0; p < count; ++p) {
    const std::byte* row = rows + p * (head_dim + kScaleBytes);
    float scale;
    __builtin_memcpy(&scale, row + head_dim, kScaleBytes);
    for (int64_t i = 0; i < head_dim; i += 16)
      store(tile + p * head_dim + i, mul(load_int8(row + i), splat(scale)));
  }
  return tile;
}

// Scores of `length` keys, filled up to a multiple of 16 with -inf; returns their maximum.
inline float scores_of(const float* q, const float* keys, int64_t length, int64_t head_dim,
                       float* scores) {
  const Lanes scale = splat(1 / __builtin_sqrtf(static_cast<float>(head_dim)));
  Lanes largest = splat(-__builtin_inff());
  for (int64_t first = 0; first < length; first += 16) {
    const int64_t count = length - first < 16 ? length - first : 16;
    Lanes products[16];
    for (int64_t p = 0; p < count; ++p) {
      const float* key = keys + (first + p) * head_dim;
      products[p] = mul(load(q), load(key));
      for (int64_t i = 16; i < head_dim; i += 16)
        products[p] = fma(load(q + i), load(key + i), products[p]);
    }
    for (int64_t p = count; p < 16; ++p) products[p] = splat(-__builtin_inff());
    const Lanes sixteen = mul(sum_each(products), scale);
    store(scores + first, sixteen);
    largest = max(largest, sixteen);
  }
  return max_of(largest);
}

// weighted[h] = weighted[h] * correction[h] + scores[h] . values, for H heads, 64 elements or fewer.
template <int H, int L>
inline void add_values(const float* scores, const float* corrections, const float* values,
                       int64_t length, int64_t head_dim, float* weighted, int64_t ld) {
  Lanes sums[H][L];
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l)
      sums[h][l] = mul(load(weighted + h * ld + l * 16), splat(corrections[h]));
  for (int64_t p = 0; p < length; ++p)
    for (int l = 0; l < L; ++l) {
      const Lanes value = load(values + p * head_dim + l * 16);
      for (int h = 0; h < H; ++h)
        sums[h][l] = fma(splat(scores[h * kChunk + p]), value, sums[h][l]);
    }
  for (int h = 0; h < H; ++h)
    for (int l = 0; l < L; ++l) store(weighted + h * ld + l * 16, sums[h][l]);
}

template <int H>
inline void add_values(const float* scores, const float* corrections, const float* values,
                       int64_t length, int64_t head_dim, float* weighted, int64_t ld) {
  constexpr int L = value_lanes(H);
  int64_t i = 0;
  for (; i + L * 16 <= head_dim; i += L * 16)
    add_values<H, L>(scores, corrections, values + i, length, head_dim, weighted + i, ld);
  for (; i < head_dim; i += 16)
    add_values<H, 1>(scores, corrections, values + i, length, head_dim, weighted + i, ld);
}

// One head's scores of a chunk as weights, relative to the running maximum, which it raises; returns the
// factor for what was summed up before.
inline float soften(const float* q, const float* keys, int64_t length, int64_t head_dim,
                    float* maximum, float* total, float* scores) {
  const float chunk_maximum = scores_of(q, keys, length, head_dim, scores);
  const float largest = chunk_maximum > *maximum ? chunk_maximum : *maximum;
  Lanes chunk_total = splat(0);
  for (int64_t p = 0; p < length; p += 16) {
    const Lanes weight = exp(sub(load(scores + p), splat(largest)));
    store(scores + p, weight);
    chunk_total = add(chunk_total, weight);
  }
  alignas(64) float correction[16];
  store(correction, exp(splat(*maximum - largest)));
  *maximum = largest;
  *total = *total * correction[0] + sum(chunk_total);
  return correction[0];
}

void attend(const AttendTask& task) {
  constexpr int64_t kHeads = 4;  // that share a load of the values
  const int64_t head_dim = task.head_dim;
  const int64_t row_bytes = cache_row_bytes(task.type, head_dim);
  const int64_t end = task.first_position + task.n_rows;  // positions the last row sees
  float* key_tile = task.tile;
  float* value_tile = task.tile + kChunk * head_dim;
  const auto head_of = [&](float* base, int64_t ld, int64_t unit, int64_t r, int64_t g) {
    return base + r * ld + g * kSplits * unit;
  };

  for (int64_t r = 0; r < task.n_rows; ++r)
    for (int64_t g = 0; g < task.group; ++g) {
      *head_of(task.maximum, task.ld_total, 1, r, g) = -__builtin_inff();
      *head_of(task.total, task.ld_total, 1, r, g) = 0;
      float* weighted = head_of(task.weighted, task.ld_weighted, head_dim, r, g);
      for (int64_t i = 0; i < head_dim; i += 16) store(weighted + i, splat(0));
    }

  for (int64_t begin = task.split * kChunk; begin < end; begin += kSplits * kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    const float* keys = widen(task.keys + begin * row_bytes, task.type, count, head_dim, key_tile);
    const float* values =
        widen(task.values + begin * row_bytes, task.type, count, head_dim, value_tile);
    for (int64_t r = 0; r < task.n_rows; ++r) {
      const int64_t seen = task.first_position + r + 1 - begin;
      const int64_t length = seen < count ? seen : count;
      if (length <= 0) continue;
      for (int64_t g = 0; g < task.group; g += kHeads) {
        const int64_t heads = task.group - g < kHeads ? task.group - g : kHeads;
        alignas(64) float scores[kHeads * kChunk];
        float corrections[kHeads];
        for (int64_t h = 0; h < heads; ++h)
          corrections[h] =
              soften(task.q + r * task.ld_q + (g + h) * head_dim, keys, length, head_dim,
                     head_of(task.maximum, task.ld_total, 1, r, g + h),
                     head_of(task.total, task.ld_total, 1, r, g + h), scores + h * kChunk);
        float* weighted = head_of(task.weighted, task.ld_weighted, head_dim, r, g);
        const int64_t ld = kSplits * head_dim;
        switch (heads) {
          case 1:
            add_values<1>(scores, corrections, values, length, head_dim, weighted, ld);
            break;
          case 2:
            add_values<2>(scores, corrections, values, length, head_dim, weighted, ld);
            break;
          case 3:
            add_values<3>(scores, corrections, values, length, head_dim, weighted, ld);
            break;
          default:
            add_values<4>(scores, corrections, values, length, head_dim, weighted, ld);
        }
      }
    }
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
