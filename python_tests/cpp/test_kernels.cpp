// Each kernel against a plain loop, on every instruction set that this processor runs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/pack.h"
#include "check.h"
#include "random_model.h"
#include "recycle/attention.h"
#include "recycle/head.h"

using namespace recycle;
using test::Buffer;

namespace {

template <class Body>
void on_every_isa(Body body) {
  const char* names[kMaxIsas];
  const int count = runnable_isas(names);
  for (int i = 0; i < count; ++i) {
    CHECK(force_isa(names[i]));
    CHECK(kernels().name == std::string(names[i]));
    body();
  }
  force_isa(nullptr);
}

bool near(double given, double exact, double tolerance) { return std::fabs(given - exact) <= tolerance; }

// Rows as an input of gemm().
struct Rows {
  Rows(int64_t rows, int64_t k, test::Random& random)
      : x(test::normals(rows * k, random)),
        quants(rows * k / 2),
        minus_sums(rows * k / kBlock),
        minus_half_sums(rows * k / 16),
        scales(rows * k / kBlock),
        sums(rows * k / kBlock),
        half_sums(rows * k / 16) {}
  Activations activations() const {
    const QuantizedRows to = {quants.data(),     scales.data(),    sums.data(),
                              minus_sums.data(), half_sums.data(), minus_half_sums.data()};
    if (x.size() % kBlock == 0) kernels().quantize(x.data(), x.size(), to);
    return {to, x.data()};
  }
  Buffer<float> x;
  Buffer<int32_t> quants, minus_sums, minus_half_sums;
  Buffer<float> scales, sums, half_sums;
};

}  // namespace

TEST(gemm_is_the_sum_over_columns) {
  test::Random random(3);
  const int64_t n = 5 * kPanelRows;
  on_every_isa([&] {
    for (int f = 0; f < kFormats; ++f)
      for (const int64_t at_least : {32, 96, 288}) {
        const auto format = static_cast<Format>(f);
        const int64_t k = round_up(at_least, k_multiple(format));
        const test::RandomMatrix matrix(format, n, k, random);
        Buffer<float> weights(n * k);
        for (int64_t i = 0; i < n; ++i) unpack_row(matrix.view, i, weights.data() + i * k);
        for (const int64_t rows : {1, 2, 3, 4, 5, 8, 13}) {
          const Rows input(rows, k, random);
          const Activations x = input.activations();
          for (const auto& [panel, panels] : {std::pair{0, 4}, {3, 2}}) {
            Buffer<float> out(rows * kTileRows);
            kernels().gemm(matrix.view, panel, panels, x, rows, matrix.view.data, out.data());
            for (int64_t row = 0; row < rows; ++row) {
              const float* values = input.x.data() + row * k;
              double largest = 0;
              for (int64_t j = 0; j < k; ++j) largest = std::max<double>(largest, std::fabs(values[j]));
              for (int64_t i = 0; i < panels * kPanelRows; ++i) {
                const float* of_output = weights.data() + (panel * kPanelRows + i) * k;
                double sum = 0, sizes = 0;
                for (int64_t j = 0; j < k; ++j)
                  sum += double{of_output[j]} * values[j], sizes += std::fabs(of_output[j]);
                // Quantized matrices round each value to 1/32767 of the largest in its block.
                const double rounding = is_quantized(format) ? 1.0 / 32767 : 1e-6;
                CHECK(near(out[row * kTileRows + i], sum, sizes * largest * rounding + 1e-6));
              }
              // The same bits for the row alone.
              Buffer<float> alone(kTileRows);
              kernels().gemm(matrix.view, panel, panels, x.from_row(row, k), 1, matrix.view.data, alone.data());
              CHECK(std::equal(alone.begin(), alone.begin() + panels * kPanelRows, out.data() + row * kTileRows));
            }
          }
        }
      }
  });
}

TEST(vector_instruction_sets_compute_the_same_bits) {
  test::Random random(7);
  for (int f = 0; f < kFormats; ++f) {
    const auto format = static_cast<Format>(f);
    const int64_t n = 3 * kPanelRows, k = round_up(96, k_multiple(format)), rows = 9;
    const test::RandomMatrix matrix(format, n, k, random);
    const Rows input(rows, k, random);
    std::vector<Buffer<float>> outputs;
    for (const char* isa : {"avx2", "avxvnni", "avx512"}) {
      if (!force_isa(isa)) continue;
      outputs.emplace_back(rows * kTileRows);
      kernels().gemm(matrix.view, 0, 3, input.activations(), rows, matrix.view.data, outputs.back().data());
    }
    for (const Buffer<float>& other : outputs) CHECK(std::equal(other.begin(), other.end(), outputs[0].begin()));
  }
  force_isa(nullptr);
}

TEST(quantize_has_the_sums_of_its_rounded_values) {
  test::Random random(4);
  on_every_isa([&] {
    Rows input(3, 96, random);
    std::fill_n(input.x.data() + 32, 32, 0.0f);  // a block of zeros
    input.activations();
    for (int64_t block = 0; block < input.scales.size(); ++block) {
      const float* x = input.x.data() + block * kBlock;
      double sum = 0, largest = 0;
      for (int64_t i = 0; i < kBlock; ++i) sum += x[i], largest = std::max<double>(largest, std::fabs(x[i]));
      const double scale = input.scales[block];
      CHECK(near(scale, largest / 32767, largest * 1e-6));
      CHECK(near(input.sums[block], sum, scale * kBlock));
      CHECK(near(-static_cast<double>(input.minus_sums[block]) * scale, input.sums[block], largest * 1e-5));
      CHECK(input.minus_sums[block] == input.minus_half_sums[2 * block] + input.minus_half_sums[2 * block + 1]);
      for (const int64_t half : {2 * block, 2 * block + 1})
        CHECK(near(-static_cast<double>(input.minus_half_sums[half]) * scale, input.half_sums[half], largest * 1e-5));
      CHECK(near(input.half_sums[2 * block + 1], std::accumulate(x + 16, x + 32, 0.0), scale * 16));
    }
  });
}

TEST(rms_norm_and_swiglu_are_their_formulas) {
  test::Random random(5);
  on_every_isa([&] {
    for (const int64_t n : {16, 48, 576}) {
      const Buffer<float> x = test::normals(n, random), weight = test::normals(n, random);
      Buffer<float> out(n);
      kernels().rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
      double squares = 0;
      for (const float value : x) squares += static_cast<double>(value) * value;
      for (int64_t i = 0; i < n; ++i)
        CHECK(near(out[i], x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * weight[i], 1e-5));
      Buffer<float> in_place(n);
      std::copy(x.begin(), x.end(), in_place.begin());
      kernels().rms_norm(in_place.data(), weight.data(), 1e-5f, n, in_place.data());
      CHECK(std::equal(out.begin(), out.end(), in_place.begin()));
      kernels().swiglu(x.data(), weight.data(), n, out.data());
      for (int64_t i = 0; i < n; ++i) CHECK(near(out[i], x[i] / (1 + std::exp(-double{x[i]})) * weight[i], 1e-5));
    }
  });
}

TEST(argmax_sum_and_maximum_see_every_value) {
  test::Random random(6);
  on_every_isa([&] {
    for (int64_t n = 1; n < 70; ++n) {
      Buffer<float> values = test::normals(n, random);
      const int64_t largest = static_cast<int64_t>(random() % n);
      values[largest] = 9;
      ArgMax best;
      std::fill_n(best.value, kPanelRows, -std::numeric_limits<float>::infinity());
      std::fill_n(best.id, kPanelRows, 0);
      std::fill_n(best.nonfinite, kPanelRows, 0.0f);
      kernels().argmax(values.data(), n, 32, &best);
      CHECK(best.value[largest % 16] == 9 && best.id[largest % 16] == 32 + largest);
      CHECK(std::all_of(best.nonfinite, best.nonfinite + 16, [](float sum) { return sum == 0; }));
      CHECK(kernels().max_value(values.data(), n) == 9);
      Buffer<float> terms(n);
      const double sum = kernels().exp_sum(values.data(), n, 9, 0.5f, terms.data());
      double exact = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double term = std::exp((double{values[i]} - 9) * 0.5);
        exact += term;
        CHECK(near(terms[i], term, 1e-6));
      }
      CHECK(near(sum, exact, 1e-5 * exact));
      CHECK(sum == kernels().exp_sum(values.data(), n, 9, 0.5f, nullptr));
      for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        values[largest] = bad;
        kernels().argmax(values.data(), n, 0, &best);
        CHECK(std::isnan(best.nonfinite[largest % 16]));
      }
    }
    const Buffer<float> ones = test::normals(192, random);
    double sum = 0;
    for (const float value : ones) sum += value;
    CHECK(near(kernels().read_stream(ones.data(), 192), sum, 1e-4));
  });
}

TEST(head_gives_the_argmax_and_its_log_probability) {
  test::Random random(7);
  on_every_isa([&] {
    for (const int64_t n : {1, 53, 200})
      for (const int threads : {1, 3}) {
        const int64_t rows = 5, hidden = 48;
        const test::RandomMatrix matrix(Format::f32, n, hidden, random);
        const Buffer<float> x = test::normals(rows * hidden, random);
        Buffer<int64_t> tokens(rows), positions(rows);
        Buffer<float> log_probs(rows);
        Buffer<std::byte> scratch(head_scratch_bytes(rows, hidden, n, true, threads));
        HeadParams params;
        params.n_rows = rows;
        params.hidden = hidden;
        params.x = x.data();
        params.head = matrix.view;
        params.positions = positions.data();
        params.tokens = tokens.data();
        params.log_probs = log_probs.data();
        params.scratch = scratch.data();
        params.n_threads = threads;
        CHECK(recycle_head(params).code == StatusCode::ok);
        for (int64_t row = 0; row < rows; ++row) {
          std::vector<double> logits(n);
          for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < hidden; ++j)
              logits[i] += double{x[row * hidden + j]} * read_weight(matrix.view, i, j);
          const auto best = std::max_element(logits.begin(), logits.end());
          CHECK(tokens[row] == best - logits.begin());
          double total = 0;
          for (const double logit : logits) total += std::exp(logit - *best);
          CHECK(near(log_probs[row], -std::log(total), 1e-5));
        }
      }
  });
}

TEST(attention_is_the_softmax_over_the_positions_before) {
  test::Random random(8);
  const int64_t heads = 4, kv_heads = 2, dim = 32, rows = 3;
  on_every_isa([&] {
    for (const int64_t length : {0, 1, 61, 64, 130, 1100})
      for (const int threads : {1, 2}) {
        const int64_t capacity = length + rows;  // not a position more
        Buffer<float> cache = test::normals(2 * kv_heads * capacity * dim, random);
        const Buffer<float> q = test::normals(rows * heads * dim, random);
        const Buffer<float> k = test::normals(rows * kv_heads * dim, random);
        const Buffer<float> v = test::normals(rows * kv_heads * dim, random);
        const Buffer<float> still(dim / 2);  // angles of 0: no rotation
        Buffer<float> out(rows * heads * dim);
        Buffer<std::byte> scratch(attention_scratch_bytes(1, rows, heads, kv_heads, dim, threads));
        AttentionParams params;
        params.batch = 1, params.n_rows = rows, params.n_heads = heads, params.n_kv_heads = kv_heads;
        params.head_dim = dim;
        params.q = q.data(), params.k = k.data(), params.v = v.data();
        params.lengths = &length;
        params.inv_freq = still.data();
        params.cache = {reinterpret_cast<std::byte*>(cache.data()), CacheType::f32, 1, kv_heads, capacity, dim};
        params.out = out.data();
        params.scratch = scratch.data();
        params.n_threads = threads;
        attention_decode(params);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t head = 0; head < heads; ++head) {
            const int64_t kv_head = head / (heads / kv_heads);
            const float* keys = cache.data() + kv_head * capacity * dim;
            const float* values = cache.data() + (kv_heads + kv_head) * capacity * dim;
            CHECK(std::equal(keys + (length + row) * dim, keys + (length + row + 1) * dim,
                             k.data() + (row * kv_heads + kv_head) * dim));
            std::vector<double> weighted(dim);
            double total = 0;
            for (int64_t position = 0; position <= length + row; ++position) {
              double score = 0;
              for (int64_t i = 0; i < dim; ++i)
                score += double{q[(row * heads + head) * dim + i]} * keys[position * dim + i];
              const double weight = std::exp(score / std::sqrt(dim));
              total += weight;
              for (int64_t i = 0; i < dim; ++i) weighted[i] += weight * values[position * dim + i];
            }
            for (int64_t i = 0; i < dim; ++i)
              CHECK(near(out[(row * heads + head) * dim + i], weighted[i] / total, 1e-5));
          }
      }
  });
}
