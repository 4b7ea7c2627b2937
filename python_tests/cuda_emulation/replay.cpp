// A program that runs cases on the emulated kernels, for builds with a sanitizer: no Python is in the process.
//
//   replay < cases      each case of race.py, in the order of Case.fields(), 8 bytes an integer
//
// Weights, caches and results each get an allocation of their own, whose ends AddressSanitizer knows.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"
#include "ops.h"
#include "recycle/arena.h"

namespace {

using recycle::CacheType;
using recycle::KvCache;
using recycle::Matrix;

constexpr recycle::cuda::Device kDevice = {1, true, 227 * 1024};

class Input {
 public:
  bool at_end() {
    const int next = std::getc(stdin);
    if (next != EOF) std::ungetc(next, stdin);
    return next == EOF;
  }
  int64_t integer() {
    int64_t value = 0;
    read(&value, sizeof value);
    return value;
  }
  float number() { return static_cast<float>(integer()) / 1024; }
  // An array, in memory that free_arrays() frees; null for an empty one.
  template <class T>
  T* array() {
    const int64_t bytes = integer();
    if (bytes == 0) return nullptr;
    auto* memory = static_cast<T*>(take(bytes));
    read(memory, bytes);
    return memory;
  }
  void* take(int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, recycle::kAlign, bytes) != 0) std::abort();
    taken_.push_back(memory);
    return memory;
  }
  void free_arrays() {
    for (void* memory : taken_) std::free(memory);
    taken_.clear();
  }

 private:
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(2);
  }
  std::vector<void*> taken_;
};

// Copies of a model's matrices and vectors, each in an allocation of its own.
class Weights {
 public:
  explicit Weights(Input& input) : input_(input) {}

  void split(recycle::Model& model) {
    split(model.base.stack);
    split(model.base.embedding);
    split(model.base.head);
    split(model.base.final_norm, model.base.stack.hidden);
    if (!model.has_module) return;
    recycle::Module& drafter = model.module;
    split(drafter.stack);
    split(drafter.input_proj);
    split(drafter.head);
    for (const float** vector : {&drafter.input_bias, &drafter.embed_norm, &drafter.hidden_norm, &drafter.output_norm})
      split(*vector, drafter.stack.hidden);
    split(drafter.draft_vocab, drafter.head.n);
  }

 private:
  void split(recycle::Stack& stack) {
    split(stack.inv_freq, stack.head_dim / 2);
    for (recycle::Layer& layer : stack.layers) {
      for (Matrix* matrix : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
        split(*matrix);
      split(layer.input_norm, stack.hidden);
      split(layer.post_norm, stack.hidden);
      split(layer.q_bias, stack.q_size());
      split(layer.k_bias, stack.kv_size());
      split(layer.v_bias, stack.kv_size());
      split(layer.q_norm, stack.head_dim);
      split(layer.k_norm, stack.head_dim);
    }
  }
  void split(Matrix& matrix) { split(matrix.data, recycle::matrix_bytes(matrix.format, matrix.n, matrix.k)); }
  template <class T>
  void split(const T*& from, int64_t n) {
    if (from == nullptr) return;
    auto* to = static_cast<T*>(input_.take(n * static_cast<int64_t>(sizeof(T))));
    std::memcpy(to, from, n * sizeof(T));
    from = to;
  }

  Input& input_;
};

KvCache read_cache(Input& input, CacheType type, int64_t batch, int64_t n_kv_heads, int64_t head_dim) {
  const int64_t capacity = input.integer();
  return {input.array<std::byte>(), type, batch, n_kv_heads, capacity, head_dim};
}

std::byte* new_scratch(Input& input, int64_t bytes) {
  auto* scratch = static_cast<std::byte*>(input.take(bytes));
  std::memset(scratch, 0xFF, bytes);
  recycle::cuda::emulator::track_scratch(scratch, bytes);
  return scratch;
}

void run_step(Input& input) {
  const int64_t plan_length = input.integer();
  const auto* plan = input.array<int64_t>();
  const int64_t weights_bytes = input.integer();
  const auto* weights = input.array<std::byte>();
  recycle::Model model;
  if (const char* wrong = recycle::read_plan(plan, plan_length, weights, weights_bytes, &model, false)) {
    std::fprintf(stderr, "replay: %s\n", wrong);
    std::exit(2);
  }
  Weights(input).split(model);
  recycle::DecodeState state;
  state.model = &model;
  state.batch = input.integer();
  state.num_draft_tokens = input.integer();
  state.mode = static_cast<recycle::Mode>(input.integer());
  const int64_t prefill_sequence = input.integer();
  const int64_t n_steps = input.integer();
  const auto type = static_cast<CacheType>(input.integer());
  const recycle::Stack &base = model.base.stack, &drafter = model.module.stack;
  state.base_cache = read_cache(input, type, state.batch, base.n_kv_heads, base.head_dim);
  state.module_cache = read_cache(input, type, state.batch, drafter.n_kv_heads, drafter.head_dim);
  state.pending = input.array<int64_t>();
  state.lengths = input.array<int64_t>();
  state.draft_probs = input.array<float>();
  state.sampling.temperature = input.number();
  state.sampling.top_k = input.integer();
  state.sampling.top_p = input.number();
  state.sampling.seeds = input.array<int64_t>();
  state.scratch = new_scratch(input, recycle::cuda::decode_scratch_bytes(model, state.batch, state.num_draft_tokens,
                                                                         state.sampling.greedy(), kDevice));
  auto* tokens = static_cast<int64_t*>(input.take(state.batch * state.rows_per_sequence() * 8));
  auto* counts = static_cast<int64_t*>(input.take(state.batch * 8));
  for (int64_t step = 0; step < n_steps; ++step) {
    if (prefill_sequence >= 0)
      recycle::cuda::finish_prefill(state, prefill_sequence, tokens, counts, kDevice, nullptr);
    else
      recycle::cuda::decode_step(state, tokens, counts, kDevice, nullptr);
    recycle::cuda::emulator::synchronize();
    for (int64_t b = 0; b < state.batch; ++b) std::printf("%ld ", static_cast<long>(counts[b]));
    for (int64_t i = 0; i < state.batch * state.rows_per_sequence(); ++i)
      std::printf("%ld ", static_cast<long>(tokens[i]));
  }
}

void run_attention(Input& input) {
  recycle::AttentionParams params;
  params.batch = input.integer();
  params.n_rows = input.integer();
  params.n_heads = input.integer();
  params.n_kv_heads = input.integer();
  params.head_dim = input.integer();
  params.q = input.array<float>();
  params.k = input.array<float>();
  params.v = input.array<float>();
  params.lengths = input.array<int64_t>();
  params.inv_freq = input.array<float>();
  params.q_norm = params.k_norm = input.array<float>();
  const auto type = static_cast<CacheType>(input.integer());
  params.cache = read_cache(input, type, params.batch, params.n_kv_heads, params.head_dim);
  params.out = static_cast<float*>(input.take(params.batch * params.n_rows * params.n_heads * params.head_dim * 4));
  params.scratch = new_scratch(input, recycle::cuda::attention_scratch_bytes(params));
  recycle::cuda::attention_decode(params, kDevice, nullptr);
  recycle::cuda::emulator::synchronize();
}

void run_head(Input& input) {
  recycle::HeadParams params;
  params.n_rows = input.integer();
  params.hidden = input.integer();
  params.x = input.array<float>();
  params.norm = input.array<float>();
  const auto format = static_cast<recycle::Format>(input.integer());
  const int64_t n_vocab = input.integer();
  params.head = {input.array<std::byte>(), format, n_vocab, params.hidden};
  params.sampling.temperature = input.number();
  params.sampling.top_k = input.integer();
  params.sampling.top_p = input.number();
  params.sampling.seeds = input.array<int64_t>();
  params.positions = input.array<int64_t>();
  params.tokens = static_cast<int64_t*>(input.take(params.n_rows * 8));
  params.log_probs = static_cast<float*>(input.take(params.n_rows * 4));
  params.scratch = new_scratch(input, recycle::cuda::head_scratch_bytes(params, kDevice));
  recycle::cuda::recycle_head(params, kDevice, nullptr);
  recycle::cuda::emulator::synchronize();
  for (int64_t i = 0; i < params.n_rows; ++i) std::printf("%ld ", static_cast<long>(params.tokens[i]));
}

}  // namespace

int main() {
  for (Input input; !input.at_end(); input.free_arrays()) {
    const char* name = input.array<char>();
    std::fprintf(stderr, "CASE %s\n", name);
    recycle::cuda::emulator::shuffle_with(static_cast<unsigned>(input.integer()));
    const int64_t kind = input.integer();
    kind == 0 ? run_step(input) : kind == 1 ? run_attention(input) : run_head(input);
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}
