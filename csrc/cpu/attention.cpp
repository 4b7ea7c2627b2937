// RoPE, cache append and attention over (sequence, key/value head, split of the cache).
//
// The work is cut so that threads get about the same: heads for the rotation, and for the attention
// itself one task a sequence, key/value head and split. The query heads of a group stay
// together: they read the same keys and values.
#include "attention.h"

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

// Half-split rotation (GPT-NeoX order): dimension i turns with i + head_dim / 2.
void rotate(float* head, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[i + half];
    head[i] = low * cos[i] - high * sin[i];
    head[i + half] = high * cos[i] + low * sin[i];
  }
}

// A row in 8 bits, each value rounded to nearest even. The scale tells if one wasn't finite: bytes can't.
void write_q8(const float* values, int64_t count, std::byte* row) {
  float largest = 0;
  float poison = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(values[i]);
    largest = size > largest ? size : largest;
    poison += values[i] * 0.0f;
  }
  // Below, the row is nothing, and dividing by it would overflow.
  const bool counts = largest > 1e-30f;
  const float up = counts ? 127 / largest : 0.0f;
  const float scale = (counts ? largest / 127 : 0.0f) + poison;
  constexpr float kShift = 0x1.8p23f;  // adding it leaves no bits for fractions
  for (int64_t i = 0; i < count; ++i)
    row[i] = static_cast<std::byte>(static_cast<int32_t>((values[i] * up + kShift) - kShift));
  std::memcpy(row + count, &scale, kScaleBytes);
}

// Elements [first, first + count) of one head at one position, all of them in 8 bits; `head` is the head's
// part of the cache.
void write_cache(const float* values, int64_t count, const KvCache& cache, std::byte* head,
                 int64_t position, int64_t first) {
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

int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace

void AttentionWork::take(Arena& arena, int64_t rows, const AttentionShape& a,
                         const AttentionShape& b) {
  const int64_t heads = larger(a.n_heads, b.n_heads);
  q = arena.take<float>(rows * larger(a.q_size(), b.q_size()));
  k = arena.take<float>(rows * larger(a.kv_size(), b.kv_size()));
  v = arena.take<float>(rows * larger(a.kv_size(), b.kv_size()));
  cos = arena.take<float>(rows * larger(a.head_dim, b.head_dim) / 2);
  sin = arena.take<float>(rows * larger(a.head_dim, b.head_dim) / 2);
  weighted = arena.take<float>(rows * kSplits * larger(a.q_size(), b.q_size()));
  total = arena.take<float>(rows * kSplits * heads);
  maximum = arena.take<float>(rows * kSplits * heads);
}

void rope_tables(const Team& team, const Rows& rows, const float* inv_freq, int64_t head_dim,
                 AttentionWork& work) {
  const Range range = team.share(rows.n);
  for (int64_t s = 0; s < rows.n_segments; ++s) {
    const Segment& segment = rows.segments[s];
    for (int64_t i = 0; i < segment.n_rows; ++i) {
      const int64_t row = segment.row + i;
      if (row < range.begin || row >= range.end) continue;
      const float position = static_cast<float>(segment.position + i);
      for (int64_t j = 0; j < head_dim / 2; ++j) {
        // In float32, as the models were trained: at large positions the rounding is visible.
        const float angle = position * inv_freq[j];
        work.cos[row * (head_dim / 2) + j] = std::cos(angle);
        work.sin[row * (head_dim / 2) + j] = std::sin(angle);
      }
    }
  }
}

Range share_v(const Team& team, const AttentionShape& shape, CacheType type) {
  const int64_t panels = shape.head_dim / kPanelRows;
  if (type != CacheType::q8) return team.share(shape.n_kv_heads * panels);
  const Range heads = team.share(shape.n_kv_heads);
  return {heads.begin * panels, heads.end * panels};
}

void rotate_and_append(Range heads, Range v_panels, const Rows& rows, const AttentionShape& shape,
                       const float* q_norm, const float* k_norm, float eps, const KvCache& cache,
                       int64_t layer, AttentionWork& work) {
  const int64_t head_dim = shape.head_dim;
  const auto rotated = [&](float* head, const float* norm, int64_t row) {
    if (norm != nullptr) kernels().rms_norm(head, norm, eps, head_dim, head);
    rotate(head, work.cos + row * (head_dim / 2), work.sin + row * (head_dim / 2), head_dim);
    return head;
  };
  for (int64_t s = 0; s < rows.n_segments; ++s) {
    const Segment& segment = rows.segments[s];
    for (int64_t i = 0; i < segment.n_rows; ++i) {
      const int64_t row = segment.row + i;
      const int64_t position = segment.position + i;
      float* q = work.q + row * shape.q_size();
      float* k = work.k + row * shape.kv_size();
      const float* v = work.v + row * shape.kv_size();
      int64_t head = heads.begin;
      for (; head < heads.end && head < shape.n_heads; ++head)
        rotated(q + head * head_dim, q_norm, row);
      for (; head < heads.end; ++head) {
        const int64_t kv_head = head - shape.n_heads;
        write_cache(rotated(k + kv_head * head_dim, k_norm, row), head_dim, cache,
                    cache.head(layer, 0, segment.sequence, kv_head), position, 0);
      }
      const int64_t step = cache.type == CacheType::q8 ? head_dim : kPanelRows;
      for (int64_t at = v_panels.begin * kPanelRows; at < v_panels.end * kPanelRows; at += step)
        write_cache(v + at, step, cache, cache.head(layer, 1, segment.sequence, at / head_dim),
                    position, at % head_dim);
    }
  }
}

void attend_splits(const Team& team, const Rows& rows, const AttentionShape& shape,
                   const KvCache& cache, int64_t layer, AttentionWork& work, float* tile) {
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
  // The task before `index`, run when the one after it is known, whose keys it can ask for.
  bool waiting = false;
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
      if (waiting) {
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
      waiting = true;
    }
  }
  if (!waiting) return;
  task.next_keys = task.keys;
  task.next_values = task.values;
  isa.attend(task);
}

void merge_row(const AttentionShape& shape, const AttentionWork& work, int64_t row,
               int64_t position, float* out) {
  const Kernels& isa = kernels();
  for (int64_t head = 0; head < shape.n_heads; ++head) {
    const int64_t at = (row * shape.n_heads + head) * kSplits;
    isa.merge_splits(work.weighted + at * shape.head_dim, work.total + at, work.maximum + at,
                     splits_of(position + 1), shape.head_dim, out + head * shape.head_dim);
  }
}

namespace {

struct Call {
  const AttentionParams& params;
  AttentionShape shape;
  AttentionWork work;
  Rows rows;
  float* tiles;
};

void take(Arena& arena, int64_t batch, int64_t n_rows, const AttentionShape& shape, int n_threads,
          AttentionWork& work, Rows& rows, float*& tiles) {
  work.take(arena, batch * n_rows, shape, shape);
  rows.segments = arena.take<Segment>(batch);
  tiles = arena.take<float>(n_threads * attend_tile_floats(batch * n_rows, shape));
}

void run(const Team& team, void* context) {
  Call& call = *static_cast<Call*>(context);
  const AttentionParams& params = call.params;
  const Range own = team.share(call.rows.n);
  const int64_t q_size = call.shape.q_size();
  const int64_t kv_size = call.shape.kv_size();
  const auto copy = [own](float* to, const float* from, int64_t size) {
    std::memcpy(to + own.begin * size, from + own.begin * size,
                (own.end - own.begin) * size * sizeof(float));
  };
  copy(call.work.q, params.q, q_size);
  copy(call.work.k, params.k, kv_size);
  copy(call.work.v, params.v, kv_size);
  rope_tables(team, call.rows, params.inv_freq, params.head_dim, call.work);
  team.barrier(Phase::leader);
  rotate_and_append(team.share(call.shape.n_heads + call.shape.n_kv_heads),
                    share_v(team, call.shape, params.cache.type), call.rows, call.shape,
                    params.q_norm, params.k_norm, params.eps, params.cache, 0, call.work);
  team.barrier(Phase::qkv);
  attend_splits(team, call.rows, call.shape, params.cache, 0, call.work,
                call.tiles + team.thread * attend_tile_floats(call.rows.n, call.shape));
  team.barrier(Phase::attention);
  for (int64_t row = own.begin; row < own.end; ++row)
    merge_row(call.shape, call.work, row, params.lengths[row / params.n_rows] + row % params.n_rows,
              params.out + row * q_size);
}

}  // namespace

int64_t attention_scratch_bytes(int64_t batch, int64_t n_rows, int64_t n_heads, int64_t n_kv_heads,
                                int64_t head_dim, int n_threads) {
  Arena arena(nullptr);
  AttentionWork work;
  Rows rows;
  float* tiles;
  take(arena, batch, n_rows, {n_heads, n_kv_heads, head_dim}, n_threads, work, rows, tiles);
  return arena.used();
}

void attention_decode(const AttentionParams& params) {
  Call call{params, {params.n_heads, params.n_kv_heads, params.head_dim}, {}, {}, nullptr};
  Arena arena(params.scratch);
  take(arena, params.batch, params.n_rows, call.shape, n_threads(), call.work, call.rows,
       call.tiles);
  for (int64_t b = 0; b < params.batch; ++b) call.rows.add(b, params.lengths[b], params.n_rows);
  parallel(run, &call);
}

}  // namespace recycle
