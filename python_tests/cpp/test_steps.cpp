// Whole decode steps and prefills, by several threads: every mode, with and without a temperature, every kind of cache.
#include <algorithm>
#include <atomic>
#include <thread>

#include "../../csrc/cpu/kernels.h"
#include "check.h"
#include "random_model.h"

using namespace recycle;
using test::RandomModel;
using test::State;

namespace {

struct Case {
  Mode mode;
  int64_t k;
  float temperature;
};
constexpr Case kCases[] = {{Mode::standard, 0, 0}, {Mode::standard, 0, 1}, {Mode::verify, 1, 0},
                           {Mode::verify, 4, 0},   {Mode::verify, 3, 1},   {Mode::alternate, 2, 0},
                           {Mode::alternate, 4, 1}};

const std::vector<int64_t> kPrompt = {5, 17, 3, 42};

std::vector<int64_t> text_of(const RandomModel& model, const Case& c, int threads, CacheType type, int64_t n_tokens) {
  State state(model, c.mode, c.k, 2, threads, c.temperature, type);
  state.prefill(0, {9, 9});
  state.prefill(1, kPrompt);
  return state.decode(1, n_tokens);
}

std::vector<int64_t> long_prompt(int64_t length) {
  std::vector<int64_t> prompt;
  for (int64_t i = 0; i < length; ++i) prompt.push_back(i * 7 % RandomModel::kVocab);
  return prompt;
}

}  // namespace

TEST(tokens_are_the_same_for_any_number_of_threads) {
  for (const Format format : {Format::f32, Format::q8_0}) {
    const RandomModel model(format);
    for (const Case& c : kCases) {
      const std::vector<int64_t> expected = text_of(model, c, 1, CacheType::bf16, 12);
      for (const int threads : {2, 3}) CHECK(text_of(model, c, threads, CacheType::bf16, 12) == expected);
    }
  }
}

TEST(greedy_verify_writes_what_standard_writes) {
  const char* names[kMaxIsas];
  const int count = runnable_isas(names);
  for (int isa = 0; isa < count; ++isa) {
    CHECK(force_isa(names[isa]));
    // Each way in which a format differs: floats, blocks of 32 and 256, minima, bits in two places, groups of 16.
    for (const Format format : {Format::f32, Format::bf16, Format::q8_0, Format::q4_1, Format::q4_k, Format::q6_k})
      for (const CacheType type : {CacheType::f32, CacheType::bf16, CacheType::q8}) {
        const RandomModel model(format);
        const auto expected = text_of(model, {Mode::standard, 0, 0}, 2, type, 16);
        for (const int64_t k : {1, 4}) CHECK(text_of(model, {Mode::verify, k, 0}, 2, type, 16) == expected);
      }
  }
  force_isa(nullptr);
}

TEST(long_prompt_and_a_step_up_to_the_last_position) {
  const RandomModel model(Format::q4_0);
  for (const Case& c : kCases) {
    const int64_t capacity = 70 + positions_needed(c.k);
    State state(model, c.mode, c.k, 1, 2, c.temperature, CacheType::q8, capacity);
    state.prefill(0, long_prompt(70));
    state.step();
    CHECK(state.counts[0] > 0);
    const int64_t length = state.lengths[0];
    state.step();
    CHECK(state.counts[0] == kNoRoom && state.lengths[0] == length && state.tokens[0] == -1);
  }
}

TEST(sequence_with_a_nan_fails_alone) {
  const RandomModel model(Format::f32);
  for (const Case& c : kCases)
    for (int64_t failed = 0; failed < 2; ++failed) {
      State expected(model, c.mode, c.k, 2, 2, c.temperature), given(model, c.mode, c.k, 2, 2, c.temperature);
      for (State* state : {&expected, &given}) {
        state->prefill(0, kPrompt);
        state->prefill(1, {1, 2});
      }
      const int64_t per_sequence = c.k + 1;
      const std::vector<int64_t> pending(given.pending.begin(), given.pending.end());
      const std::vector<float> probs(given.draft_probs.begin(), given.draft_probs.end());
      *reinterpret_cast<float*>(given.state.base_cache.head(0, 1, failed, 0)) = std::nanf("");
      expected.step();
      given.step();
      CHECK(given.counts[failed] == kNotFinite && given.tokens[failed * per_sequence] == -1);
      for (int64_t j = 0; j < per_sequence; ++j) {
        CHECK(given.pending[failed * per_sequence + j] == pending[failed * per_sequence + j]);
        const int64_t other = (1 - failed) * per_sequence + j;
        CHECK(given.pending[other] == expected.pending[other] && given.tokens[other] == expected.tokens[other]);
      }
      const int64_t n_probs = given.draft_probs.size() / 2;
      CHECK(std::equal(probs.begin() + failed * n_probs, probs.begin() + (failed + 1) * n_probs,
                       given.draft_probs.data() + failed * n_probs));
      CHECK(std::equal(expected.draft_probs.data() + (1 - failed) * n_probs,
                       expected.draft_probs.data() + (2 - failed) * n_probs,
                       given.draft_probs.data() + (1 - failed) * n_probs));
    }
}

TEST(drafts_of_every_id_are_legal) {
  const RandomModel model(Format::f32);
  for (const float temperature : {0.0f, 1.0f}) {
    State state(model, Mode::verify, 2, 1, 2, temperature, CacheType::f32, 400);
    state.prefill(0, kPrompt);
    for (int64_t token = 0; token < RandomModel::kVocab; ++token) {
      state.pending[1] = token;
      state.pending[2] = RandomModel::kVocab - 1 - token;
      state.step();
      CHECK(state.counts[0] >= 1 && state.counts[0] <= 3);
    }
  }
}

TEST(idle_batch_has_an_empty_step) {
  const RandomModel model(Format::bf16);
  for (const Case& c : kCases) {
    State state(model, c.mode, c.k, 2, 3, c.temperature);
    state.step();
    CHECK(state.counts[0] == 0 && state.counts[1] == 0 && state.tokens[0] == -1);
  }
}

TEST(interrupted_prefill_leaves_its_sequence_idle) {
  const RandomModel model(Format::f32);
  State state(model, Mode::verify, 2, 1, 2, 0, CacheType::f32, 300);
  state.prefill(0, kPrompt);
  const std::vector<int64_t> prompt = long_prompt(200);
  static int asked;
  asked = 0;
  const Status status = prefill(state.state, 0, prompt.data(), prompt.size(), [] { return ++asked == 2; });
  CHECK(status.code == StatusCode::interrupted && asked == 2);
  CHECK(state.pending[0] == -1 && state.lengths[0] == 0 && state.lengths[1] == 0);
}

TEST(steps_of_several_threads_run_beside_each_other) {
  const RandomModel model(Format::q8_0);
  std::vector<std::vector<int64_t>> expected;
  for (const Case& c : kCases) expected.push_back(text_of(model, c, 1, CacheType::f32, 8));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] {
      for (size_t c = 0; c < std::size(kCases); ++c) {
        const size_t index = (c + i) % std::size(kCases);
        CHECK(text_of(model, kCases[index], 1 + static_cast<int>(i), CacheType::f32, 8) == expected[index]);
      }
    });
  for (std::thread& thread : threads) thread.join();
}
