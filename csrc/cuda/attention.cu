// RoPE, append to the cache and grouped-query attention of a few new rows a sequence.
//
//   q [rows, heads, head_dim], k and v [rows, kv heads, head_dim] as the products left them, the cache
//   -> out [rows, heads, head_dim], and the new rows in the cache
//
// One block: one split of the cache (chunks s, s + 16, ... of 64 positions), one key/value head of one sequence, up
// to 8 of its queries. Online softmax (Milakov and Gimelshein 2018); the last block of a head to come to its end
// merges the splits (Flash-Decoding). What makes a chunk and a split depends on positions alone, and a query never
// meets another, so its bits don't depend on how many rows or sequences there are.
// New keys are rotated by the one block whose split they fall in, and go into the cache and into its tile; queries by
// every block, which costs less than a kernel of its own.
// Bounded by the bytes of the cache once the context is long; before that by the latency of a few steps. A tile of
// keys and values is read once for all queries. Tried: nothing yet on a GPU.
#include "kernels.h"

namespace recycle::cuda {

namespace {

constexpr int kChunk = 64;  // positions
constexpr int kBlockThreads = 128;
constexpr int kBlockWarps = kBlockThreads / kWarp;

int64_t round_to_16(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// Elements of 16 bytes, and these as floats.
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

RECYCLE_DEVICE void widen(uint4 raw, float (&values)[4]) {
  values[0] = std::bit_cast<float>(raw.x);
  values[1] = std::bit_cast<float>(raw.y);
  values[2] = std::bit_cast<float>(raw.z);
  values[3] = std::bit_cast<float>(raw.w);
}
RECYCLE_DEVICE void widen(uint4 raw, float (&values)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = std::bit_cast<float>(words[i] << 16);
    values[2 * i + 1] = std::bit_cast<float>(words[i] & 0xFFFF0000u);
  }
}

// Two neighbours as floats.
RECYCLE_DEVICE float2 read_two(const float* at) {
  return *reinterpret_cast<const float2*>(at);
}
RECYCLE_DEVICE float2 read_two(const uint16_t* at) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(at);
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xFFFF0000u)};
}

// A row of a tile has 16 bytes more than a row of the cache, so that threads that read the same column of
// different rows meet different banks.
template <class T>
constexpr int64_t tile_row(int64_t head_dim) {
  return head_dim + 16 / static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t shared_bytes(int64_t head_dim) {
  return 2 * round_to_16(kChunk * tile_row<T>(head_dim) * sizeof(T)) +
         (kQueries * (head_dim + kChunk + 3) + 1) * 4;
}

RECYCLE_DEVICE void write(float value, float* to) {
  *to = value;
}
RECYCLE_DEVICE void write(float value, uint16_t* to) {
  *to = to_bf16(value);
}

// One head of one row, by one warp: norm (unless null) and RoPE; put(i, value) for each element.
template <class Put>
RECYCLE_DEVICE void rotate(const float* head, const float* norm, float eps, const float* inv_freq,
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
    // In float32, as the models were trained: at large positions the rounding is visible.
    const float angle = static_cast<float>(position) * inv_freq[i];
    const float cosine = cosf(angle), sine = sinf(angle);
    const float low = at(i), high = at(i + head_dim / 2);
    put(i, low * cosine - high * sine);
    put(i + head_dim / 2, high * cosine + low * sine);
  }
}

template <class T>
class AttendBlock {
 public:
  RECYCLE_DEVICE explicit AttendBlock(const AttentionCall& call)
      : call_(call),
        head_dim_(call.head_dim),
        split_(blockIdx.x),
        kv_head_(blockIdx.y % call.n_kv_heads),
        sequence_(blockIdx.y / call.n_kv_heads),
        group_(call.n_heads / call.n_kv_heads) {}

  RECYCLE_DEVICE void run() {
    const int* positions = call_.rows.positions + sequence_ * call_.rows.width;
    base_ = positions[0];
    if (base_ < 0) return;
    int valid = 1;
    while (valid < call_.rows.width && positions[valid] >= 0) ++valid;
    end_ = base_ + valid;
    const int chunks = (end_ + kChunk - 1) / kChunk;
    const int splits = chunks < kSplits ? chunks : kSplits;
    first_query_ = blockIdx.z * kQueries;
    n_queries_ = valid * group_ - first_query_;
    if (n_queries_ > kQueries) n_queries_ = kQueries;
    if (split_ >= splits || n_queries_ <= 0) return;
    cut_shared_memory();
    load_queries();
    for (int i = 0; i < kSums; ++i) sums_[i][0] = sums_[i][1] = 0;
    for (int chunk = split_; chunk < chunks; chunk += kSplits) attend_chunk(chunk * kChunk);
    leave_results();
    unsigned* counter = call_.arrays.arrived + blockIdx.z * gridDim.y + blockIdx.y;
    if (is_last_block(counter, splits, flag_)) merge(splits);
  }

 private:
  static constexpr int kSums = kQueries;  // queries that a thread may sum values for

  RECYCLE_DEVICE void cut_shared_memory() {
    auto* at = shared_memory<unsigned char>();
    const auto take = [&](int64_t bytes) {
      unsigned char* taken = at;
      at += (bytes + 15) / 16 * 16;
      return taken;
    };
    const int64_t tile = kChunk * tile_row<T>(head_dim_) * sizeof(T);
    keys_ = reinterpret_cast<T*>(take(tile));
    values_ = reinterpret_cast<T*>(take(tile));
    queries_ = reinterpret_cast<float*>(at);
    scores_ = queries_ + kQueries * head_dim_;
    maximum_ = scores_ + kQueries * kChunk;
    total_ = maximum_ + kQueries;
    correction_ = total_ + kQueries;
    flag_ = reinterpret_cast<unsigned*>(correction_ + kQueries);
  }

  RECYCLE_DEVICE int query_row(int query) const { return (first_query_ + query) / group_; }
  RECYCLE_DEVICE int query_head(int query) const {
    return kv_head_ * group_ + (first_query_ + query) % group_;
  }
  // The query's place among all (row, head) of the step.
  RECYCLE_DEVICE int64_t query_at(int query) const {
    const int64_t row = int64_t{sequence_} * call_.rows.width + query_row(query);
    return row * call_.n_heads + query_head(query);
  }

  RECYCLE_DEVICE void load_queries() {
    for (int query = threadIdx.x / kWarp; query < n_queries_; query += kBlockWarps) {
      const float* head = call_.arrays.q + query_at(query) * head_dim_;
      rotate(head, call_.q_norm, call_.eps, call_.inv_freq, base_ + query_row(query), head_dim_,
             [&](int i, float value) { queries_[query * head_dim_ + i] = value; });
    }
    if (threadIdx.x < kQueries) {
      maximum_[threadIdx.x] = -INFINITY;
      total_[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  RECYCLE_DEVICE T* cache(int kv) const {
    const KvCache& cache = call_.cache;
    const int64_t index =
        ((call_.layer * 2 + kv) * cache.n_sequences + sequence_) * cache.n_kv_heads + kv_head_;
    return reinterpret_cast<T*>(cache.data) + index * cache.capacity * head_dim_;
  }

  // Keys and values at begin .. begin + count, in 16-byte pieces, but for the new ones.
  RECYCLE_DEVICE void load_tiles(int begin, int count) {
    const int pieces = head_dim_ / kPiece<T>;
    const int old = base_ - begin < count ? base_ - begin : count;
    const T* from[2] = {cache(0) + begin * int64_t{head_dim_},
                        cache(1) + begin * int64_t{head_dim_}};
#pragma unroll 4
    for (int i = threadIdx.x; i < old * pieces; i += kBlockThreads) {
      const int row = i / pieces, piece = i % pieces * kPiece<T>;
      const int64_t at = row * int64_t{head_dim_} + piece;
      const uint4 key = *reinterpret_cast<const uint4*>(from[0] + at);
      const uint4 value = *reinterpret_cast<const uint4*>(from[1] + at);
      const int64_t to = row * tile_row<T>(head_dim_) + piece;
      *reinterpret_cast<uint4*>(keys_ + to) = key;
      *reinterpret_cast<uint4*>(values_ + to) = value;
    }
  }

  // The new rows of this chunk: rotated keys and values, rounded as the cache has them.
  RECYCLE_DEVICE void append(int begin, int count) {
    const bool writes = blockIdx.z == 0;
    for (int row = threadIdx.x / kWarp; row < end_ - base_; row += kBlockWarps) {
      const int position = base_ + row;
      if (position < begin || position >= begin + count) continue;
      const int64_t from =
          ((int64_t{sequence_} * call_.rows.width + row) * call_.n_kv_heads + kv_head_) * head_dim_;
      const int64_t to = position * int64_t{head_dim_};
      const int64_t in_tile = (position - begin) * tile_row<T>(head_dim_);
      rotate(call_.arrays.k + from, call_.k_norm, call_.eps, call_.inv_freq, position, head_dim_,
             [&](int i, float value) {
               write(value, keys_ + in_tile + i);
               if (writes) write(value, cache(0) + to + i);
             });
      for (int i = threadIdx.x % kWarp; i < head_dim_; i += kWarp) {
        const float value = call_.arrays.v[from + i];
        write(value, values_ + in_tile + i);
        if (writes) write(value, cache(1) + to + i);
      }
    }
  }

  RECYCLE_DEVICE void attend_chunk(int begin) {
    const int count = end_ - begin < kChunk ? end_ - begin : kChunk;
    load_tiles(begin, count);
    if (base_ < begin + count) append(begin, count);
    __syncthreads();
    score(begin, count);
    __syncthreads();
    soften();
    __syncthreads();
    add_values(count);
    __syncthreads();
  }

  // A thread has one position and every second query.
  RECYCLE_DEVICE void score(int begin, int count) {
    constexpr int kTurns = kBlockThreads / kChunk;
    constexpr int kOwn = kQueries / kTurns;
    const int p = threadIdx.x % kChunk;
    const int first = threadIdx.x / kChunk;
    float sums[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums[i] = 0;
    if (p < count) {
      const T* key = keys_ + p * tile_row<T>(head_dim_);
      for (int d = 0; d < head_dim_; d += kPiece<T>) {
        float elements[kPiece<T>];
        widen(*reinterpret_cast<const uint4*>(key + d), elements);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int query = first + i * kTurns;
          if (query >= n_queries_) continue;
#pragma unroll
          for (int e = 0; e < kPiece<T>; ++e)
            sums[i] = fmaf(elements[e], queries_[query * head_dim_ + d + e], sums[i]);
        }
      }
    }
    const float scale = 1 / sqrtf(static_cast<float>(head_dim_));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int query = first + i * kTurns;
      if (query >= n_queries_) continue;
      const bool seen = p < count && begin + p <= base_ + query_row(query);
      scores_[query * kChunk + p] = seen ? sums[i] * scale : -INFINITY;
    }
  }

  // Scores become weights relative to the running maximum, a query a warp.
  RECYCLE_DEVICE void soften() {
    const int lane = threadIdx.x % kWarp;
    for (int query = threadIdx.x / kWarp; query < n_queries_; query += kBlockWarps) {
      float* scores = scores_ + query * kChunk;
      const float first = scores[lane], second = scores[lane + kWarp];
      const float before = maximum_[query];
      const float largest = fmaxf(before, warp_max(fmaxf(first, second)));
      // A row may see nothing of a chunk, and have seen nothing before.
      const bool any = largest > -INFINITY;
      const float weight = any ? expf(first - largest) : 0;
      const float other = any ? expf(second - largest) : 0;
      scores[lane] = weight;
      scores[lane + kWarp] = other;
      const float sum = warp_sum(weight + other);
      if (lane == 0) {
        correction_[query] = any ? expf(before - largest) : 1;
        maximum_[query] = largest;
        total_[query] = total_[query] * correction_[query] + sum;
      }
    }
  }

  // A thread has two neighbouring elements of some queries.
  RECYCLE_DEVICE int pairs() const { return head_dim_ / 2; }
  RECYCLE_DEVICE int turns() const {
    const int turns = kBlockThreads / pairs();
    return turns < kQueries ? turns : kQueries;
  }

  RECYCLE_DEVICE void add_values(int count) {
    const int d = threadIdx.x % pairs() * 2;
    const int first = threadIdx.x / pairs();
    const int step = turns();
    if (first >= step) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int query = first + i * step;
      if (query >= n_queries_) continue;
      sums_[i][0] *= correction_[query];
      sums_[i][1] *= correction_[query];
    }
    for (int p = 0; p < count; ++p) {
      const float2 two = read_two(values_ + p * tile_row<T>(head_dim_) + d);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int query = first + i * step;
        if (query >= n_queries_) continue;
        const float weight = scores_[query * kChunk + p];
        sums_[i][0] = fmaf(weight, two.x, sums_[i][0]);
        sums_[i][1] = fmaf(weight, two.y, sums_[i][1]);
      }
    }
  }

  RECYCLE_DEVICE int64_t n_all() const {
    return int64_t{call_.rows.batch} * call_.rows.width * call_.n_heads;
  }

  RECYCLE_DEVICE void leave_results() {
    const int d = threadIdx.x % pairs() * 2;
    const int first = threadIdx.x / pairs();
    const int step = turns();
    if (first < step) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int query = first + i * step;
        if (query >= n_queries_) continue;
        float* to = call_.arrays.weighted + (split_ * n_all() + query_at(query)) * head_dim_ + d;
        to[0] = sums_[i][0];
        to[1] = sums_[i][1];
      }
    }
    if (static_cast<int>(threadIdx.x) < n_queries_) {
      const int64_t at = split_ * n_all() + query_at(threadIdx.x);
      call_.arrays.total[at] = total_[threadIdx.x];
      call_.arrays.maximum[at] = maximum_[threadIdx.x];
    }
  }

  RECYCLE_DEVICE void merge(int splits) {
    // scores_ [queries, kSplits]: what a split counts for.
    static_assert(kSplits <= kChunk);
    if (static_cast<int>(threadIdx.x) < n_queries_) {
      const int64_t at = query_at(threadIdx.x);
      float* factors = scores_ + threadIdx.x * kSplits;
      float largest = -INFINITY;
      for (int s = 0; s < splits; ++s)
        largest = fmaxf(largest, call_.arrays.maximum[s * n_all() + at]);
      float total = 0;
      for (int s = 0; s < splits; ++s) {
        factors[s] = expf(call_.arrays.maximum[s * n_all() + at] - largest);
        total = fmaf(factors[s], call_.arrays.total[s * n_all() + at], total);
      }
      total_[threadIdx.x] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_queries_ * head_dim_; i += kBlockThreads) {
      const int query = i / head_dim_;
      const int64_t at = query_at(query) * head_dim_ + i % head_dim_;
      float value = 0;
#pragma unroll 4
      for (int s = 0; s < splits; ++s)
        value = fmaf(scores_[query * kSplits + s],
                     call_.arrays.weighted[s * n_all() * head_dim_ + at], value);
      call_.arrays.out[at] = value / total_[query];
    }
  }

  const AttentionCall& call_;
  const int head_dim_, split_, kv_head_, sequence_, group_;
  int base_, end_, first_query_, n_queries_;
  T *keys_, *values_;                      // [kChunk, tile_row]
  float *queries_, *scores_;               // [kQueries, head_dim], [kQueries, kChunk]
  float *maximum_, *total_, *correction_;  // [kQueries]
  unsigned* flag_;
  float sums_[kSums][2];
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 4) attend_kernel(AttentionCall call) {
  let_next_start();
  wait_for_previous();
  AttendBlock<T>(call).run();
}

}  // namespace

int64_t attention_shared_bytes(CacheType type, int64_t head_dim) {
  return type == CacheType::f32 ? shared_bytes<float>(head_dim) : shared_bytes<uint16_t>(head_dim);
}

void attend(Launcher& launcher, const AttentionCall& call) {
  const int group = call.n_heads / call.n_kv_heads;
  const dim3 grid(kSplits, call.n_kv_heads * call.rows.batch, query_tiles(call.rows.width, group));
  const int64_t bytes = attention_shared_bytes(call.cache.type, call.head_dim);
  if (call.cache.type == CacheType::f32)
    launcher.run(attend_kernel<float>, grid, kBlockThreads, bytes, call);
  else
    launcher.run(attend_kernel<uint16_t>, grid, kBlockThreads, bytes, call);
}

}  // namespace recycle::cuda
