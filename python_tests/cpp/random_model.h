// Random matrices and a small random model in memory, in buffers of exactly the size that the code under test needs, so
// that AddressSanitizer sees each byte past them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "recycle/decode_step.h"
#include "recycle/format.h"
#include "recycle/model.h"
#include "recycle/numbers.h"

namespace test {

using recycle::Format;
using Random = std::mt19937;

// `count` values, zero, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    void* data = nullptr;
    CHECK(posix_memalign(&data, 64, std::max<int64_t>(count, 1) * sizeof(T)) == 0);
    std::memset(data, 0, count * sizeof(T));
    data_.reset(static_cast<T*>(data));
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t count_;
};

inline float normal(Random& random) { return std::normal_distribution<float>()(random); }

inline Buffer<float> normals(int64_t count, Random& random) {
  Buffer<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Rows as checkpoints hold them, of weights between about -1/8 and 1/8.
inline Buffer<std::byte> random_rows(Format format, int64_t n, int64_t k, Random& random) {
  Buffer<std::byte> rows(n * recycle::row_bytes(format, k));
  for (std::byte& byte : rows) byte = static_cast<std::byte>(random() & 255);
  const auto put = [&](int64_t at, auto value) { std::memcpy(rows.data() + at, &value, sizeof(value)); };
  switch (format) {
    case Format::f32:
      for (int64_t i = 0; i < n * k; ++i) put(i * 4, normal(random) / 16);
      break;
    case Format::bf16:
      for (int64_t i = 0; i < n * k; ++i) put(i * 2, recycle::to_bf16(normal(random) / 16));
      break;
    case Format::f16:  // exponents of 2^-7 to 2^-4
      for (int64_t i = 0; i < n * k; ++i)
        put(i * 2, static_cast<uint16_t>((random() & 0x83FF) | (8 + random() % 4) << 10));
      break;
    default: {
      const recycle::Quantization q = recycle::quantization(format);
      // The half scale: 2^-10 for quants of 8 bits and for blocks of 256, whose integer scales are some 30; else 2^-6.
      const int exponent = q.low_bits == 8 || q.is_block_256() || recycle::has_table(format) ? 0x1400 : 0x2400;
      const int64_t at = format == Format::q2_k ? 80 : format == Format::q3_k ? 108 : format == Format::q6_k ? 208 : 0;
      for (int64_t block = 0; block < n * k / q.block; ++block) {
        put(block * q.file_bytes + at, static_cast<uint16_t>(exponent | (random() & 0x3FF)));
        if (!q.has_minimum()) continue;
        // About -0.117; in a block of 256 a positive number that is subtracted.
        put(block * q.file_bytes + at + 2, static_cast<uint16_t>(q.is_block_256() ? 0x1C00 : 0xAF80));
      }
    }
  }
  return rows;
}

// A packed random matrix that owns its bytes.
struct RandomMatrix {
  RandomMatrix(Format format, int64_t n, int64_t k, Random& random)
      : packed(recycle::matrix_bytes(format, n, k)), view{packed.data(), format, n, k} {
    recycle::pack_rows(format, k, 0, n, random_rows(format, n, k, random).data(), packed.data());
  }
  Buffer<std::byte> packed;
  recycle::Matrix view;
};

// A model and its module; the plan and the weights as recycle_ext/weights/plan.py writes them.
class RandomModel {
 public:
  static constexpr int64_t kVocab = 53, kDraftVocab = 21;
  static constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 16;

  explicit RandomModel(Format format, unsigned seed = 0)
      : hidden_(recycle::round_up(32, recycle::k_multiple(format))),
        inner_(recycle::round_up(64, recycle::k_multiple(format))),
        random_(seed) {
    plan = {recycle::kPlanMagic, recycle::kPlanVersion, 0, 1};
    stack(2);
    plan.push_back(kVocab);
    matrix(format, kVocab, hidden_);
    vector(hidden_);
    matrix(format, kVocab, hidden_);
    for (int layer = 0; layer < 2; ++layer) add_layer(format);
    stack(1);
    matrix(format, hidden_, 2 * hidden_);
    plan.push_back(-1);
    for (int norm = 0; norm < 3; ++norm) vector(hidden_);
    plan.push_back(kDraftVocab);
    matrix(format, kDraftVocab, hidden_);
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < kDraftVocab; ++i) ids.push_back(2 * i + 3);
    add(ids.data(), kDraftVocab * 8);
    plan.push_back(0);
    add_layer(format);
    plan[2] = static_cast<int64_t>(plan.size());
    // Exactly as many bytes as the plan says.
    weights = std::make_unique<Buffer<std::byte>>(static_cast<int64_t>(bytes_.size()));
    std::memcpy(weights->data(), bytes_.data(), bytes_.size());
    CHECK(recycle::read_plan(plan.data(), plan[2], weights->data(), weights->size(), &model) == nullptr);
  }

  std::vector<int64_t> plan;
  std::unique_ptr<Buffer<std::byte>> weights;
  recycle::Model model;

 private:
  void add(const void* data, int64_t bytes) {
    plan.push_back(static_cast<int64_t>(bytes_.size()));
    const auto* from = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), from, from + bytes);
    bytes_.resize(recycle::round_up(static_cast<int64_t>(bytes_.size()), recycle::kAlign));
  }
  void vector(int64_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = 1 + normal(random_) / 8;
    add(values.data(), n * 4);
  }
  void matrix(Format format, int64_t n, int64_t k) {
    // The attention's output is too short for a block of 256; a file that people have mixes formats as well.
    if (k % recycle::k_multiple(format) != 0) format = Format::q8_0;
    const RandomMatrix made(format, n, k, random_);
    add(made.packed.data(), made.packed.size());
    plan.insert(plan.end(), {static_cast<int64_t>(format), n, k});
  }
  void stack(int64_t layers) {
    plan.insert(plan.end(), {hidden_, inner_, layers, kHeads, kKvHeads, kHeadDim, 0x3727C5AC});  // eps 1e-5
    std::vector<float> inv_freq;
    for (int64_t i = 0; i < kHeadDim / 2; ++i) inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(i) / 8));
    add(inv_freq.data(), kHeadDim * 2);
  }
  void add_layer(Format format) {
    vector(hidden_);
    matrix(format, kHeads * kHeadDim, hidden_);
    matrix(format, kKvHeads * kHeadDim, hidden_);
    matrix(format, kKvHeads * kHeadDim, hidden_);
    plan.insert(plan.end(), {-1, -1, -1});
    vector(kHeadDim);
    vector(kHeadDim);
    matrix(format, hidden_, kHeads * kHeadDim);
    vector(hidden_);
    matrix(format, inner_, hidden_);
    matrix(format, inner_, hidden_);
    matrix(format, hidden_, inner_);
  }

  const int64_t hidden_, inner_;
  Random random_;
  std::vector<std::byte> bytes_;
};

// A decoder's state.
class State {
 public:
  State(const RandomModel& of, recycle::Mode mode, int64_t k, int64_t batch, int threads, float temperature = 0,
        recycle::CacheType type = recycle::CacheType::f32, int64_t capacity = 100)
      : base_(cache_bytes(of.model.base.stack, batch, capacity, type)),
        module_(k > 0 ? cache_bytes(of.model.module.stack, batch, capacity, type) : 0),
        pending(batch * (k + 1)),
        lengths(2 * batch),
        draft_probs(temperature > 0 ? batch * k * RandomModel::kDraftVocab : 0),
        tokens(batch * (k + 1)),
        counts(batch),
        seeds_(batch),
        scratch_(recycle::decode_scratch_bytes(of.model, batch, k, temperature == 0, threads)) {
    std::fill(pending.begin(), pending.end(), -1);
    for (int64_t b = 0; b < batch; ++b) seeds_[b] = 100 + b;
    state.model = &of.model;
    state.batch = batch;
    state.num_draft_tokens = k;
    state.mode = mode;
    state.sampling = {temperature, 0, temperature > 0 ? 0.95f : 1.0f, seeds_.data()};
    state.base_cache = cache(base_, of.model.base.stack, batch, capacity, type);
    if (k > 0) state.module_cache = cache(module_, of.model.module.stack, batch, capacity, type);
    state.pending = pending.data();
    state.lengths = lengths.data();
    state.draft_probs = draft_probs.data();
    state.scratch = scratch_.data();
    state.n_threads = threads;
  }

  void prefill(int64_t sequence, const std::vector<int64_t>& prompt) {
    const recycle::Status status = recycle::prefill(state, sequence, prompt.data(), prompt.size());
    CHECK(status.code == recycle::StatusCode::ok);
  }
  void step() { recycle::decode_step(state, tokens.data(), counts.data()); }

  // The new tokens of a sequence, step after step, the prefill's first.
  std::vector<int64_t> decode(int64_t sequence, int64_t n_tokens) {
    std::vector<int64_t> text = {pending[sequence * state.rows_per_sequence()]};
    while (static_cast<int64_t>(text.size()) < n_tokens) {
      step();
      CHECK(counts[sequence] > 0);
      const int64_t* row = tokens.data() + sequence * state.rows_per_sequence();
      text.insert(text.end(), row, row + counts[sequence]);
    }
    text.resize(n_tokens);
    return text;
  }

 private:
  Buffer<std::byte> base_, module_;

 public:
  Buffer<int64_t> pending, lengths;
  Buffer<float> draft_probs;
  Buffer<int64_t> tokens, counts;

 private:
  static int64_t cache_bytes(const recycle::Stack& stack, int64_t batch, int64_t capacity, recycle::CacheType type) {
    return stack.n_layers * 2 * batch * stack.n_kv_heads * capacity * recycle::cache_row_bytes(type, stack.head_dim);
  }
  static recycle::KvCache cache(const Buffer<std::byte>& data, const recycle::Stack& stack, int64_t batch,
                                int64_t capacity, recycle::CacheType type) {
    return {data.data(), type, batch, stack.n_kv_heads, capacity, stack.head_dim};
  }

  Buffer<int64_t> seeds_;
  Buffer<std::byte> scratch_;

 public:
  recycle::DecodeState state;
};

}  // namespace test
