// RoPE, append to the cache and grouped-query attention, for a few new rows of each sequence.
//
//   q [rows, heads, head_dim], k and v [rows, kv heads, head_dim] before norm and RoPE, the cache
//   -> out [rows, heads, head_dim], and the new rows in the cache
//
// One block computes one split of the cache (chunks s, s + 16, ... of 64 positions) of one key/value head of one
// sequence, for up to 8 queries, with an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The last
// block of a head to end combines the splits (Flash-Decoding, Dao et al. 2023). Chunks and splits depend on positions
// alone, and queries never mix, so the bits of a query don't depend on the number of rows or sequences.
// The block whose split has a new row's position rotates the key, and stores it in the cache and in its own tile.
// Every block rotates its queries: that costs less than a kernel for it.
//
// Bounded by the bytes of the cache where the context is long, before that by latency. Each tile of keys and values
// is read once for all queries. No alternative was tried on a GPU yet.
#include "kernels.h"
#include "ops.h"

namespace recycle::cuda {

namespace {

constexpr int kChunk = 64;  // positions
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// Elements of the cache in one load of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

RECYCLE_DEVICE float to_float(float value) { return value; }
RECYCLE_DEVICE float to_float(uint16_t value) { return bf16_to_float(value); }

// Two neighbours as floats.
RECYCLE_DEVICE float2 load_two(const float* from) { return *reinterpret_cast<const float2*>(from); }
RECYCLE_DEVICE float2 load_two(const uint16_t* from) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xFFFF0000u)};
}

RECYCLE_DEVICE void store(float value, float* to) { *to = value; }
RECYCLE_DEVICE void store(float value, uint16_t* to) { *to = to_bf16(value); }

// Elements from row to row of a tile: 16 bytes more than a row, so that threads which read the same column of
// different rows use different banks of shared memory.
template <class T>
constexpr int64_t tile_stride(int64_t head_dim) {
  return head_dim + kVector<T>;
}
template <class T>
constexpr int64_t tile_bytes(int64_t head_dim) {
  return round_up(kChunk * tile_stride<T>(head_dim) * sizeof(T), 16);
}

// RMSNorm (unless `norm` is null) and RoPE of one head, by one warp; put(i, value) takes each element.
template <class Put>
RECYCLE_DEVICE void norm_and_rotate(const float* head, const float* norm, float eps, const float* inv_freq,
                                    int position, int head_dim, Put put) {
  const int lane = threadIdx.x % kWarp;
  float scale = 1;
  if (norm != nullptr) {
    float sum = 0;
    for (int i = lane; i < head_dim; i += kWarp) sum = fmaf(head[i], head[i], sum);
    scale = 1 / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + eps);
  }
  const auto at = [&](int i) { return norm != nullptr ? head[i] * scale * norm[i] : head[i]; };
  for (int i = lane; i < head_dim / 2; i += kWarp) {
    // In float32, as in training: at large positions the rounding is visible.
    const float angle = static_cast<float>(position) * inv_freq[i];
    const float cosine = cosf(angle), sine = sinf(angle);
    const float low = at(i), high = at(i + head_dim / 2);
    put(i, low * cosine - high * sine);
    put(i + head_dim / 2, high * cosine + low * sine);
  }
}

// T: the cache's element: float, or uint16_t, which is always bfloat16.
template <class T>
class AttentionBlock {
 public:
  RECYCLE_DEVICE explicit AttentionBlock(const AttentionKernelParams& params)
      : params_(params),
        head_dim_(params.head_dim),
        split_(blockIdx.x),
        kv_head_(blockIdx.y % params.n_kv_heads),
        sequence_(blockIdx.y / params.n_kv_heads),
        group_(params.n_heads / params.n_kv_heads) {}

  RECYCLE_DEVICE void run() {
    const int* positions = params_.rows.positions + sequence_ * params_.rows.rows_per_sequence;
    base_ = positions[0];
    if (base_ < 0) return;
    int n_used = 1;
    while (n_used < params_.rows.rows_per_sequence && positions[n_used] >= 0) ++n_used;
    end_ = base_ + n_used;
    const int chunks = (end_ + kChunk - 1) / kChunk;
    const int splits = chunks < kSplits ? chunks : kSplits;
    first_query_ = blockIdx.z * kQueries;
    n_queries_ = n_used * group_ - first_query_;
    if (n_queries_ > kQueries) n_queries_ = kQueries;
    if (split_ >= splits || n_queries_ <= 0) return;
    assign_shared_memory();
    load_queries();
    for (int i = 0; i < kQueries; ++i) sums_[i][0] = sums_[i][1] = 0;
    for (int chunk = split_; chunk < chunks; chunk += kSplits) attend_chunk(chunk * kChunk);
    store_split();
    unsigned* counter = params_.buffers.blocks_done + blockIdx.z * gridDim.y + blockIdx.y;
    if (is_last_block(counter, splits, flag_)) combine_splits(splits);
  }

  static int64_t shared_bytes(int64_t head_dim) {
    return 2 * tile_bytes<T>(head_dim) + (kQueries * (head_dim + kChunk + 3) + 1) * 4;
  }

 private:
  RECYCLE_DEVICE void assign_shared_memory() {
    auto* tiles = shared_memory<unsigned char>();
    keys_ = reinterpret_cast<T*>(tiles);
    values_ = reinterpret_cast<T*>(tiles + tile_bytes<T>(head_dim_));
    queries_ = reinterpret_cast<float*>(tiles + 2 * tile_bytes<T>(head_dim_));
    scores_ = queries_ + kQueries * head_dim_;
    max_ = scores_ + kQueries * kChunk;
    sum_ = max_ + kQueries;
    correction_ = sum_ + kQueries;
    flag_ = reinterpret_cast<unsigned*>(correction_ + kQueries);
  }

  RECYCLE_DEVICE int query_row(int query) const { return (first_query_ + query) / group_; }
  // Index of a query among all (row, head) of the step.
  RECYCLE_DEVICE int64_t query_index(int query) const {
    const int64_t row = int64_t{sequence_} * params_.rows.rows_per_sequence + query_row(query);
    return row * params_.n_heads + kv_head_ * group_ + (first_query_ + query) % group_;
  }
  // Index of a query's result in a split.
  RECYCLE_DEVICE int64_t split_index(int split, int64_t query_index) const {
    return split * (int64_t{params_.rows.n_rows()} * params_.n_heads) + query_index;
  }

  RECYCLE_DEVICE void load_queries() {
    for (int query = threadIdx.x / kWarp; query < n_queries_; query += kWarps) {
      const float* head = params_.buffers.q + query_index(query) * head_dim_;
      norm_and_rotate(head, params_.q_norm, params_.eps, params_.inv_freq, base_ + query_row(query), head_dim_,
                      [&](int i, float value) { queries_[query * head_dim_ + i] = value; });
    }
    if (threadIdx.x < kQueries) {
      max_[threadIdx.x] = -INFINITY;
      sum_[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  // The head's keys (kv 0) or values (kv 1): [capacity, head_dim]
  RECYCLE_DEVICE T* cache(int kv) const {
    const KvCache& cache = params_.cache;
    const int64_t index = ((params_.layer * 2 + kv) * cache.n_sequences + sequence_) * cache.n_kv_heads + kv_head_;
    return reinterpret_cast<T*>(cache.data) + index * cache.capacity * head_dim_;
  }

  RECYCLE_DEVICE void attend_chunk(int begin) {
    const int count = end_ - begin < kChunk ? end_ - begin : kChunk;
    load_tiles(begin, count);
    if (base_ < begin + count) append(begin, count);
    __syncthreads();
    compute_scores(begin, count);
    __syncthreads();
    online_softmax_update();
    __syncthreads();
    add_values(count);
    __syncthreads();
  }

  // Cached keys and values of positions [begin, begin + count), 16 bytes a thread.
  RECYCLE_DEVICE void load_tiles(int begin, int count) {
    const int vectors = head_dim_ / kVector<T>;
    const int cached = base_ - begin < count ? base_ - begin : count;
    const T* from[2] = {cache(0) + begin * int64_t{head_dim_}, cache(1) + begin * int64_t{head_dim_}};
#pragma unroll 4
    for (int i = threadIdx.x; i < cached * vectors; i += kThreads) {
      const int row = i / vectors, column = i % vectors * kVector<T>;
      const int64_t at = row * int64_t{head_dim_} + column;
      const uint4 key = *reinterpret_cast<const uint4*>(from[0] + at);
      const uint4 value = *reinterpret_cast<const uint4*>(from[1] + at);
      const int64_t to = row * tile_stride<T>(head_dim_) + column;
      *reinterpret_cast<uint4*>(keys_ + to) = key;
      *reinterpret_cast<uint4*>(values_ + to) = value;
    }
  }

  // The new rows of a chunk, to the tiles and the cache. The tiles are rounded as the cache is, so that a position
  // has the same bits in this step and in later ones.
  RECYCLE_DEVICE void append(int begin, int count) {
    const bool stores = blockIdx.z == 0;
    for (int row = threadIdx.x / kWarp; row < end_ - base_; row += kWarps) {
      const int position = base_ + row;
      if (position < begin || position >= begin + count) continue;
      const int64_t from =
          ((int64_t{sequence_} * params_.rows.rows_per_sequence + row) * params_.n_kv_heads + kv_head_) * head_dim_;
      const int64_t to = position * int64_t{head_dim_};
      const int64_t in_tile = (position - begin) * tile_stride<T>(head_dim_);
      norm_and_rotate(params_.buffers.k + from, params_.k_norm, params_.eps, params_.inv_freq, position, head_dim_,
                      [&](int i, float value) {
                        store(value, keys_ + in_tile + i);
                        if (stores) store(value, cache(0) + to + i);
                      });
      for (int i = threadIdx.x % kWarp; i < head_dim_; i += kWarp) {
        const float value = params_.buffers.v[from + i];
        store(value, values_ + in_tile + i);
        if (stores) store(value, cache(1) + to + i);
      }
    }
  }

  // A thread computes one position's scores with every second query.
  RECYCLE_DEVICE void compute_scores(int begin, int count) {
    constexpr int kStep = kThreads / kChunk;
    constexpr int kQueriesPerThread = kQueries / kStep;
    const int p = threadIdx.x % kChunk;
    const int first = threadIdx.x / kChunk;
    float sums[kQueriesPerThread];
#pragma unroll
    for (int i = 0; i < kQueriesPerThread; ++i) sums[i] = 0;
    if (p < count) {
      const T* key = keys_ + p * tile_stride<T>(head_dim_);
      for (int d = 0; d < head_dim_; d += kVector<T>) {
        const uint4 raw = *reinterpret_cast<const uint4*>(key + d);
        T elements[kVector<T>];
        memcpy(elements, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < kQueriesPerThread; ++i) {
          const int query = first + i * kStep;
          if (query >= n_queries_) continue;
#pragma unroll
          for (int e = 0; e < kVector<T>; ++e)
            sums[i] = fmaf(to_float(elements[e]), queries_[query * head_dim_ + d + e], sums[i]);
        }
      }
    }
    const float scale = 1 / sqrtf(static_cast<float>(head_dim_));
#pragma unroll
    for (int i = 0; i < kQueriesPerThread; ++i) {
      const int query = first + i * kStep;
      if (query >= n_queries_) continue;
      const bool is_visible = p < count && begin + p <= base_ + query_row(query);
      scores_[query * kChunk + p] = is_visible ? sums[i] * scale : -INFINITY;
    }
  }

  // Scores become weights exp(score - running maximum); a warp computes a query.
  RECYCLE_DEVICE void online_softmax_update() {
    const int lane = threadIdx.x % kWarp;
    for (int query = threadIdx.x / kWarp; query < n_queries_; query += kWarps) {
      float* scores = scores_ + query * kChunk;
      const float first = scores[lane], second = scores[lane + kWarp];
      const float old_max = max_[query];
      const float new_max = fmaxf(old_max, warp_max(fmaxf(first, second)));
      // A row may see no position of this chunk and of the chunks before.
      const bool any_visible = new_max > -INFINITY;
      const float first_weight = any_visible ? expf(first - new_max) : 0;
      const float second_weight = any_visible ? expf(second - new_max) : 0;
      scores[lane] = first_weight;
      scores[lane + kWarp] = second_weight;
      const float sum = warp_sum(first_weight + second_weight);
      __syncwarp();  // all threads have read max_: a shuffle orders no memory
      if (lane == 0) {
        correction_[query] = any_visible ? expf(old_max - new_max) : 1;
        max_[query] = new_max;
        sum_[query] = sum_[query] * correction_[query] + sum;
      }
    }
  }

  // sums_[i] has elements column() and column() + 1 of the outputs of query first_sum() + i * query_step(). The
  // values of a head are pairs of elements, one a thread; threads left over start with the next query.
  RECYCLE_DEVICE int column() const { return threadIdx.x % (head_dim_ / 2) * 2; }
  RECYCLE_DEVICE int first_sum() const { return threadIdx.x / (head_dim_ / 2); }
  RECYCLE_DEVICE int query_step() const {
    const int step = kThreads / (head_dim_ / 2);
    return step < kQueries ? step : kQueries;
  }

  RECYCLE_DEVICE void add_values(int count) {
    const int first = first_sum(), step = query_step();
    if (first >= step) return;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int query = first + i * step;
      if (query >= n_queries_) continue;
      sums_[i][0] *= correction_[query];
      sums_[i][1] *= correction_[query];
    }
    const T* value = values_ + column();
    for (int p = 0; p < count; ++p, value += tile_stride<T>(head_dim_)) {
      const float2 two = load_two(value);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const int query = first + i * step;
        if (query >= n_queries_) continue;
        const float weight = scores_[query * kChunk + p];
        sums_[i][0] = fmaf(weight, two.x, sums_[i][0]);
        sums_[i][1] = fmaf(weight, two.y, sums_[i][1]);
      }
    }
  }

  // This split's results, to global memory.
  RECYCLE_DEVICE void store_split() {
    const int first = first_sum(), step = query_step();
    if (first < step) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const int query = first + i * step;
        if (query >= n_queries_) continue;
        const int64_t at = split_index(split_, query_index(query));
        float* to = params_.buffers.split_out + at * head_dim_ + column();
        to[0] = sums_[i][0];
        to[1] = sums_[i][1];
      }
    }
    if (static_cast<int>(threadIdx.x) < n_queries_) {
      const int64_t at = split_index(split_, query_index(threadIdx.x));
      params_.buffers.split_sum[at] = sum_[threadIdx.x];
      params_.buffers.split_max[at] = max_[threadIdx.x];
    }
  }

  // out = sum over splits of exp(split_max - max) * split_out, divided by the same sum of split_sum
  RECYCLE_DEVICE void combine_splits(int splits) {
    static_assert(kSplits <= kChunk);  // factors [kQueries, kSplits] replace the scores
    const AttentionBuffers& buffers = params_.buffers;
    if (static_cast<int>(threadIdx.x) < n_queries_) {
      const int64_t query = query_index(threadIdx.x);
      float* factors = scores_ + threadIdx.x * kSplits;
      float max = -INFINITY;
      for (int s = 0; s < splits; ++s) max = fmaxf(max, buffers.split_max[split_index(s, query)]);
      float sum = 0;
      for (int s = 0; s < splits; ++s) {
        factors[s] = expf(buffers.split_max[split_index(s, query)] - max);
        sum = fmaf(factors[s], buffers.split_sum[split_index(s, query)], sum);
      }
      sum_[threadIdx.x] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_queries_ * head_dim_; i += kThreads) {
      const int query = i / head_dim_, d = i % head_dim_;
      const int64_t index = query_index(query);
      float value = 0;
#pragma unroll 4
      for (int s = 0; s < splits; ++s)
        value = fmaf(scores_[query * kSplits + s], buffers.split_out[split_index(s, index) * head_dim_ + d], value);
      buffers.out[index * head_dim_ + d] = value / sum_[query];
    }
  }

  const AttentionKernelParams& params_;
  const int head_dim_, split_, kv_head_, sequence_;
  const int group_;  // query heads of a key/value head
  int base_, end_;   // positions: the first new row, and after the last
  int first_query_, n_queries_;
  T *keys_, *values_;                // [kChunk, tile_stride]
  float *queries_, *scores_;         // [kQueries, head_dim], [kQueries, kChunk]
  float *max_, *sum_, *correction_;  // [kQueries] the online softmax's state
  unsigned* flag_;
  float sums_[kQueries][2];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) attention_kernel(AttentionKernelParams params) {
  launch_dependents();
  grid_dependency_wait();
  AttentionBlock<T>(params).run();
}

}  // namespace

int64_t attention_shared_bytes(CacheType type, int64_t head_dim) {
  return type == CacheType::f32 ? AttentionBlock<float>::shared_bytes(head_dim)
                                : AttentionBlock<uint16_t>::shared_bytes(head_dim);
}

void attention(Launcher& launcher, const AttentionKernelParams& params) {
  const int group = params.n_heads / params.n_kv_heads;
  const dim3 grid(kSplits, params.n_kv_heads * params.rows.batch, query_tiles(params.rows.rows_per_sequence, group));
  const int64_t bytes = attention_shared_bytes(params.cache.type, params.head_dim);
  const auto kernel = params.cache.type == CacheType::f32 ? attention_kernel<float> : attention_kernel<uint16_t>;
  launcher.run(kernel, grid, kThreads, bytes, params);
}

}  // namespace recycle::cuda
