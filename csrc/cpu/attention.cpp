// RoPE, cache append and attention over (sequence, key/value head, split of the cache).
//
//   q [rows, heads, head_dim], k and v [rows, kv heads, head_dim], the cache  ->  out [rows, heads, head_dim]
//
// Threads share heads for the rotation, and tasks for the attention: one task is a sequence, a key/value head and a
// split. The query heads of a group stay together, because they read the same keys and values. Bounded by the
// cache's bytes (kernels/attention.h).
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "recycle/attention.h"
#include "recycle/numbers.h"

namespace recycle {

namespace {

int64_t splits_of(int64_t positions) {
  const int64_t chunks = (positions + kChunk - 1) / kChunk;
  return chunks < kSplits ? chunks : kSplits;
}

// RoPE (Su et al. 2021, arXiv 2104.09864) in GPT-NeoX order: element i rotates with element i + head_dim / 2.
void rotate(float* head, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[i + half];
    head[i] = low * cos[i] - high * sin[i];
    head[i + half] = high * cos[i] + low * sin[i];
  }
}

// A row in 8 bits, each value rounded to nearest even. After a nonfinite value the scale is NaN, since bytes can't be.
void write_q8(const float* values, int64_t count, std::byte* row) {
  float max_abs = 0;
  float nonfinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float abs = std::fabs(values[i]);
    max_abs = abs > max_abs ? abs : max_abs;
    nonfinite += values[i] * 0.0f;
  }
  // A smaller row counts as zeros: 127 / max_abs would overflow.
  const bool nonzero = max_abs > 1e-30f;
  const float inv_scale = nonzero ? 127 / max_abs : 0.0f;
  const float scale = (nonzero ? max_abs / 127 : 0.0f) + nonfinite;
  constexpr float kRound = 0x1.8p23f;  // a sum with it has no bits for fractions
  for (int64_t i = 0; i < count; ++i)
    row[i] = static_cast<std::byte>(static_cast<int32_t>((values[i] * inv_scale + kRound) - kRound));
  std::memcpy(row + count, &scale, kScaleBytes);
}

// Writes elements [first, first + count) of one head at one position, or the whole row in 8 bits. head: the head's
// part of the cache.
void write_cache(const float* values, int64_t count, const KvCache& cache, std::byte* head, int64_t position,
                 int64_t first) {
  std::byte* row = head + position * cache.row_bytes();
  if (cache.type == CacheType::q8) return write_q8(values, count, row);
  if (cache.type == CacheType::f32) {
    std::memcpy(row + first * 4, values, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t value = to_bf16(values[i]);
    std::memcpy(row + (first + i) * 2, &value, 2);
  }
}

}  // namespace

void AttentionWork::take(Arena& arena, int64_t rows, const AttentionShape& a, const AttentionShape& b) {
  const int64_t heads = std::max(a.n_heads, b.n_heads);
  q = arena.take<float>(rows * std::max(a.q_size(), b.q_size()));
  k = arena.take<float>(rows * std::max(a.kv_size(), b.kv_size()));
  v = arena.take<float>(rows * std::max(a.kv_size(), b.kv_size()));
  cos = arena.take<float>(rows * std::max(a.head_dim, b.head_dim) / 2);
  sin = arena.take<float>(rows * std::max(a.head_dim, b.head_dim) / 2);
  weighted = arena.take<float>(rows * kSplits * std::max(a.q_size(), b.q_size()));
  total = arena.take<float>(rows * kSplits * heads);
  maximum = arena.take<float>(rows * kSplits * heads);
}

void rope_tables(const Team& team, const Rows& rows, const float* inv_freq, int64_t head_dim, AttentionWork& work) {
  for_each_row(rows, team.share(rows.n), [&](const Segment&, int64_t row, int64_t position) {
    for (int64_t j = 0; j < head_dim / 2; ++j) {
      // In float32, as the models were trained: the rounding shows at large positions.
      const float angle = static_cast<float>(position) * inv_freq[j];
      work.cos[row * (head_dim / 2) + j] = std::cos(angle);
      work.sin[row * (head_dim / 2) + j] = std::sin(angle);
    }
  });
}

Range share_v(const Team& team, const AttentionShape& shape, CacheType type) {
  const int64_t panels = shape.head_dim / kPanelRows;
  if (type != CacheType::q8) return team.share(shape.n_kv_heads * panels);
  const Range heads = team.share(shape.n_kv_heads);
  return {heads.begin * panels, heads.end * panels};
}

void rotate_and_append(Range heads, Range v_panels, const Rows& rows, const AttentionShape& shape, const float* q_norm,
                       const float* k_norm, float eps, const KvCache& cache, int64_t layer, AttentionWork& work) {
  const int64_t head_dim = shape.head_dim;
  const auto rotated = [&](float* head, const float* norm, int64_t row) {
    if (norm != nullptr) kernels().rms_norm(head, norm, eps, head_dim, head);
    rotate(head, work.cos + row * (head_dim / 2), work.sin + row * (head_dim / 2), head_dim);
    return head;
  };
  const int64_t step = cache.type == CacheType::q8 ? head_dim : kPanelRows;
  for_each_row(rows, {0, rows.n}, [&](const Segment& segment, int64_t row, int64_t position) {
    float* q = work.q + row * shape.q_size();
    float* k = work.k + row * shape.kv_size();
    const float* v = work.v + row * shape.kv_size();
    int64_t head = heads.begin;
    for (; head < heads.end && head < shape.n_heads; ++head) rotated(q + head * head_dim, q_norm, row);
    for (; head < heads.end; ++head) {
      const int64_t kv_head = head - shape.n_heads;
      write_cache(rotated(k + kv_head * head_dim, k_norm, row), head_dim, cache,
                  cache.head(layer, 0, segment.sequence, kv_head), position, 0);
    }
    for (int64_t at = v_panels.begin * kPanelRows; at < v_panels.end * kPanelRows; at += step)
      write_cache(v + at, step, cache, cache.head(layer, 1, segment.sequence, at / head_dim), position, at % head_dim);
  });
}

void attend_splits(const Team& team, const Rows& rows, const AttentionShape& shape, const KvCache& cache, int64_t layer,
                   AttentionWork& work, float* tile) {
  const Kernels& isa = kernels();
  const int64_t group = shape.n_heads / shape.n_kv_heads;
  int64_t tasks = 0;
  for (int64_t s = 0; s < rows.n_segments; ++s)
    tasks += splits_of(rows.segments[s].position + rows.segments[s].n_rows) * shape.n_kv_heads;
  const Range range = team.share(tasks);

  AttendTask task;
  task.ld_q = shape.q_size();
  task.group = group;
  task.head_dim = shape.head_dim;
  task.type = cache.type;
  task.ld_weighted = shape.n_heads * kSplits * shape.head_dim;
  task.ld_total = shape.n_heads * kSplits;
  task.tile = tile;
  // A task runs once the next one is known, whose keys it prefetches.
  bool has_task = false;
  int64_t index = 0;
  for (int64_t s = 0; s < rows.n_segments; ++s) {
    const Segment& segment = rows.segments[s];
    const int64_t splits = splits_of(segment.position + segment.n_rows);
    for (int64_t i = 0; i < splits * shape.n_kv_heads; ++i, ++index) {
      if (index < range.begin || index >= range.end) continue;
      const int64_t kv_head = i / splits;
      const int64_t split = i % splits;
      const std::byte* keys = cache.head(layer, 0, segment.sequence, kv_head);
      const std::byte* values = cache.head(layer, 1, segment.sequence, kv_head);
      if (has_task) {
        task.next_keys = keys + split * kChunk * cache.row_bytes();
        task.next_values = values + split * kChunk * cache.row_bytes();
        isa.attend(task);
      }
      const int64_t head = segment.row * shape.n_heads + kv_head * group;
      task.split = split;
      task.n_rows = segment.n_rows;
      task.first_position = segment.position;
      task.q = work.q + segment.row * shape.q_size() + kv_head * group * shape.head_dim;
      task.keys = keys;
      task.values = values;
      task.weighted = work.weighted + (head * kSplits + split) * shape.head_dim;
      task.total = work.total + head * kSplits + split;
      task.maximum = work.maximum + head * kSplits + split;
      has_task = true;
    }
  }
  if (!has_task) return;
  task.next_keys = task.keys;
  task.next_values = task.values;
  isa.attend(task);
}

void combine_row(const AttentionShape& shape, const AttentionWork& work, int64_t row, int64_t position, float* out) {
  const Kernels& isa = kernels();
  for (int64_t head = 0; head < shape.n_heads; ++head) {
    const int64_t at = (row * shape.n_heads + head) * kSplits;
    isa.combine_splits(work.weighted + at * shape.head_dim, work.total + at, work.maximum + at, splits_of(position + 1),
                       shape.head_dim, out + head * shape.head_dim);
  }
}

namespace {

// The scratch of attention_decode.
struct DecodeAttentionWork {
  AttentionWork attention;
  Rows rows;
  float* tiles;  // [threads, attend_tile_floats()]

  void take(Arena& arena, int64_t batch, int64_t n_rows, const AttentionShape& shape, int n_threads) {
    attention.take(arena, batch * n_rows, shape, shape);
    rows.segments = arena.take<Segment>(batch);
    tiles = arena.take<float>(n_threads * attend_tile_floats(batch * n_rows, shape));
  }
};

// attention_decode on one thread of the team.
void run(const Team& team, const AttentionParams& params, const AttentionShape& shape, DecodeAttentionWork& work) {
  const Range share = team.share(work.rows.n);
  const auto copy = [share](float* to, const float* from, int64_t size) {
    std::memcpy(to + share.begin * size, from + share.begin * size, (share.end - share.begin) * size * sizeof(float));
  };
  copy(work.attention.q, params.q, shape.q_size());
  copy(work.attention.k, params.k, shape.kv_size());
  copy(work.attention.v, params.v, shape.kv_size());
  rope_tables(team, work.rows, params.inv_freq, params.head_dim, work.attention);
  team.barrier(Phase::leader);
  rotate_and_append(team.share(shape.n_heads + shape.n_kv_heads), share_v(team, shape, params.cache.type), work.rows,
                    shape, params.q_norm, params.k_norm, params.eps, params.cache, 0, work.attention);
  team.barrier(Phase::qkv);
  attend_splits(team, work.rows, shape, params.cache, 0, work.attention,
                work.tiles + team.thread * attend_tile_floats(work.rows.n, shape));
  team.barrier(Phase::attention);
  for_each_row(work.rows, share, [&](const Segment&, int64_t row, int64_t position) {
    combine_row(shape, work.attention, row, position, params.out + row * shape.q_size());
  });
}

}  // namespace

int64_t attention_scratch_bytes(int64_t batch, int64_t n_rows, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                                int n_threads) {
  Arena arena(nullptr);
  DecodeAttentionWork work;
  work.take(arena, batch, n_rows, {n_heads, n_kv_heads, head_dim}, n_threads);
  return arena.used();
}

void attention_decode(const AttentionParams& params) {
  const AttentionShape shape = {params.n_heads, params.n_kv_heads, params.head_dim};
  DecodeAttentionWork work;
  Arena arena(params.scratch);
  work.take(arena, params.batch, params.n_rows, shape, params.n_threads);
  for (int64_t b = 0; b < params.batch; ++b) work.rows.add(b, params.lengths[b], params.n_rows);
  parallel(params.n_threads, [&](const Team& team) { run(team, params, shape, work); });
}

}  // namespace recycle
