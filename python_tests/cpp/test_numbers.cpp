// Numbers without kernels: random draws, conversions, the choice of draft tokens, packing, plans, distributions.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/pack.h"
#include "../../csrc/cpu/sampling.h"
#include "check.h"
#include "random_model.h"
#include "recycle/choice.h"
#include "recycle/random.h"

using namespace recycle;

TEST(philox_gives_numbers_of_the_published_generator) {
  // Random123's known answers for Philox-4x32-10: the first of four numbers, of which uniform() keeps 24 bits.
  CHECK(uniform(0, 0, Stream::sample) == static_cast<float>(0x6627e8d5u >> 8) * 0x1p-24f);
  constexpr float constant = uniform(~uint64_t{0}, 0, Stream::sample);  // the compiler computes the same
  CHECK(constant == uniform(~uint64_t{0}, 0, Stream::sample));
}

TEST(draws_of_other_seeds_positions_and_streams_differ_and_are_uniform) {
  double sum = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    const float u = uniform(7, i, Stream::accept);
    CHECK(u >= 0 && u < 1);
    sum += u;
  }
  CHECK(std::fabs(sum / 20000 - 0.5) < 0.01);
  const float u = uniform(1, 2, Stream::sample);
  CHECK(u != uniform(2, 2, Stream::sample) && u != uniform(1, 3, Stream::sample) && u != uniform(1, 2, Stream::draft));
  CHECK(u != uniform(1 | uint64_t{1} << 32, 2, Stream::sample) &&
        u != uniform(1, 2 | uint64_t{1} << 32, Stream::sample));
}

TEST(half_and_bfloat16_convert_as_their_formats_say) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto value = static_cast<uint16_t>(bits);
    const float bf16 = bf16_to_float(value);
    if (!std::isnan(bf16)) CHECK(to_bf16(bf16) == value);
    const int exponent = value >> 10 & 31;
    const double mantissa = value & 1023;
    const double sign = value >> 15 != 0 ? -1 : 1;
    const float half = half_to_float(value);
    if (exponent == 31)
      CHECK(mantissa == 0 ? std::isinf(half) && (half > 0) == (sign > 0) : std::isnan(half));
    else
      CHECK(half == sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25)));
  }
  CHECK(to_bf16(1 + 0x1p-8f) == to_bf16(1) && to_bf16(1 + 0x1.8p-7f) == to_bf16(1 + 0x1p-6f));  // ties to even
  CHECK(std::isnan(bf16_to_float(to_bf16(std::nanf("")))));
}

TEST(greedy_verify_accepts_the_longest_prefix_that_the_argmax_names) {
  const int64_t pending[] = {5, 6, 7, 8};
  const auto choose = [&](std::initializer_list<int64_t> argmax) {
    return verify_greedy(pending, 3, [&](int64_t j) { return argmax.begin()[j]; });
  };
  CHECK(choose({9, 0, 0, 0}).accepted == 0 && choose({9, 0, 0, 0}).token == 9);
  CHECK(choose({6, 9, 8, 0}).accepted == 1 && choose({6, 9, 8, 0}).token == 9);
  CHECK(choose({6, 7, 8, 4}).accepted == 3 && choose({6, 7, 8, 4}).token == 4);
}

TEST(draft_is_accepted_with_probability_p_over_q) {
  CHECK(accepts_draft(0.49f, 0.25f, 0.5f) && !accepts_draft(0.5f, 0.25f, 0.5f));
  CHECK(accepts_draft(0.999f, 0.5f, 0.25f));
  CHECK(accepts_draft(0.999f, 1e-30f, 0) && !accepts_draft(0, 0, 0));  // outside of the draft vocabulary
  CHECK(residual(0.5f, 0.25f) == 0.25f && residual(0.25f, 0.5f) == 0);
}

TEST(unpacked_rows_are_the_rows_that_were_packed) {
  test::Random random(1);
  for (int format = 0; format < kFormats; ++format)
    for (const int64_t n : {1, 16, 37}) {
      const auto kind = static_cast<Format>(format);
      const int64_t k = round_up(96, k_multiple(kind));
      const auto rows = test::random_rows(kind, n, k, random);
      test::Buffer<std::byte> packed(matrix_bytes(kind, n, k));
      // In two calls where there are panels for two.
      const int64_t first = n > 16 ? 16 : n;
      pack_rows(kind, k, 0, first, rows.data(), packed.data());
      if (n > first) pack_rows(kind, k, first, n - first, rows.data() + first * row_bytes(kind, k), packed.data());
      const Matrix matrix{packed.data(), kind, n, k};
      test::Buffer<float> row(k);
      for (int64_t i = 0; i < n; ++i) {
        unpack_row(matrix, i, row.data());
        const std::byte* source = rows.data() + i * row_bytes(kind, k);
        for (int64_t j = 0; j < k; ++j) {
          CHECK(row[j] == read_weight(matrix, i, j));
          float exact = 0;
          const std::byte* block = source + j / kBlock * row_bytes(kind, kBlock);
          const auto u16 = [](const std::byte* at) { return *reinterpret_cast<const uint16_t*>(at); };
          const auto nibble = [&](const std::byte* quants) {
            return static_cast<float>(std::to_integer<int>(quants[j % 16]) >> (j % 32 < 16 ? 0 : 4) & 15);
          };
          if (kind == Format::f32) exact = *reinterpret_cast<const float*>(source + j * 4);
          if (kind == Format::f16) exact = half_to_float(u16(source + j * 2));
          if (kind == Format::bf16) exact = bf16_to_float(u16(source + j * 2));
          if (kind == Format::q8_0)
            exact = half_to_float(u16(block)) * static_cast<float>(static_cast<int8_t>(block[2 + j % 32]));
          if (kind == Format::q4_0) exact = half_to_float(u16(block)) * (nibble(block + 2) - 8);
          if (kind == Format::q4_1)
            exact = half_to_float(u16(block)) * nibble(block + 4) + half_to_float(u16(block + 2));
          // Blocks of 256 and those with a fifth bit or a table: test_weights_layout.py has another reader for them.
          if (k_multiple(kind) == 16 || (quantization(kind).high_bits == 0 && k == 96 && !has_table(kind)))
            CHECK(row[j] == exact);
        }
      }
    }
}

TEST(plan_that_is_cut_off_is_refused) {
  const test::RandomModel model(Format::q4_1);
  for (int64_t length = 0; length < model.plan[2]; ++length) {
    test::Buffer<int64_t> plan(length);
    std::copy_n(model.plan.begin(), length, plan.data());
    Model read;
    CHECK(read_plan(plan.data(), length, model.weights->data(), model.weights->size(), &read) != nullptr);
  }
}

TEST(plan_with_a_wrong_entry_is_refused_or_points_inside) {
  const test::RandomModel model(Format::q4_1);
  int refused = 0;
  for (size_t entry = 0; entry < model.plan.size(); ++entry)
    for (const int64_t wrong : {int64_t{-7}, int64_t{0}, int64_t{1} << 20, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
      std::vector<int64_t> plan = model.plan;
      plan[entry] = wrong;
      Model read;
      const char* error = read_plan(plan.data(), plan.size(), model.weights->data(), model.weights->size(), &read);
      refused += error != nullptr;
      if (error != nullptr) continue;
      // AddressSanitizer sees a byte outside.
      const Matrix& last = read.module.stack.layers[0].down;
      test::Buffer<float> row(last.k);
      unpack_row(last, last.n - 1, row.data());
    }
  CHECK(refused > 4 * static_cast<int>(model.plan.size()));
}

TEST(drawn_token_is_the_one_whose_interval_holds_u) {
  const float probs[] = {0, 0.25f, 0, 0.5f, 0.25f, 0};
  CHECK(draw(probs, 6, 0) == 1 && draw(probs, 6, 0.249f) == 1 && draw(probs, 6, 0.25f) == 3);
  CHECK(draw(probs, 6, 0.749f) == 3 && draw(probs, 6, 0.75f) == 4 && draw(probs, 6, 0x1.fffffep-1f) == 4);
  // A vocabulary of several blocks, its end impossible: every third token weighs 2^-10.
  std::vector<float> many(3500);
  for (size_t i = 0; i < 1024; ++i) many[3 * i + 1] = 0x1p-10f;
  for (int64_t i = 0; i < 1024; ++i) {
    const auto u = static_cast<float>(i) * 0x1p-10f;
    CHECK(draw(many.data(), 3500, u) == 3 * i + 1 && draw(many.data(), 3500, u + 0x1.fp-11f) == 3 * i + 1);
  }
}

namespace {

// The definition, in double precision.
std::vector<double> plain_distribution(const Sampling& sampling, const std::vector<float>& logits) {
  const size_t n = logits.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  std::vector<double> probs(n);
  const float lowest =
      sampling.top_k > 0 ? logits[order[std::min<size_t>(sampling.top_k, n) - 1]] : logits[order[n - 1]];
  double total = 0;
  for (size_t i = 0; i < n; ++i) {
    const double above = static_cast<double>(logits[i]) - logits[order[0]];
    probs[i] = logits[i] >= lowest ? std::exp(above / static_cast<double>(sampling.temperature)) : 0;
    total += probs[i];
  }
  for (double& p : probs) p /= total;
  // By probability and then by id: equal probabilities may be those of different logits.
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return probs[a] > probs[b]; });
  double before = 0, kept = 0;
  for (const size_t token : order) {
    const double p = probs[token];
    if (before >= static_cast<double>(sampling.top_p)) probs[token] = 0;
    before += p;
    kept += probs[token];
  }
  for (double& p : probs) p /= kept;
  return probs;
}

}  // namespace

TEST(distribution_is_that_of_its_definition) {
  test::Random random(2);
  const char* names[kMaxIsas];
  const int count = runnable_isas(names);
  for (int isa = 0; isa < count; ++isa) {
    CHECK(force_isa(names[isa]));
    for (const int64_t n : {1, 5, 53, 300, 1000})
      for (const float temperature : {0x1p-126f, 1e-3f, 0.7f, 2.5f, 0x1p126f})
        for (const int64_t top_k : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{5000}})
          for (const float top_p : {1.0f, 0.9f, 0.01f}) {
            std::vector<float> logits(n);
            for (float& logit : logits) logit = 3 * test::normal(random);
            if (n == 1000)  // with many that are equal
              for (float& logit : logits) logit = std::round(8 * logit) / 8;
            const Sampling sampling{temperature, top_k, top_p, nullptr};
            test::Buffer<float> probs(n);
            test::Buffer<int32_t> order(n);
            CHECK(to_distribution(sampling, logits.data(), n, probs.data(), order.data()));
            const std::vector<double> exact = plain_distribution(sampling, logits);
            for (int64_t i = 0; i < n; ++i) CHECK(std::fabs(probs[i] - exact[i]) < 2e-5);
            logits[n / 2] = std::nanf("");
            CHECK(!to_distribution(sampling, logits.data(), n, probs.data(), order.data()));
          }
  }
  force_isa(nullptr);
}
