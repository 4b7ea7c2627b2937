// The C functions of the emulation library (library.py). All "GPU memory" is the memory of the process.
#include <vector>

#include "emulator.h"
#include "gemv.cuh"
#include "ops.h"
#include "recycle/decode_step.h"
#include "recycle/model.h"

namespace {

// One multiprocessor: with more, no block would take several tiles, because the tests' models are small.
constexpr recycle::cuda::Device kDevice = {1, true, 227 * 1024};

}  // namespace

extern "C" {

// State of library.py: the same fields in the same order.
struct EmulatedState {
  const int64_t* plan;
  int64_t plan_length;
  const std::byte* weights;
  int64_t weights_bytes;
  int64_t batch, num_draft_tokens, mode;
  int64_t cache_type;  // recycle::CacheType
  std::byte* base_cache;
  int64_t base_capacity;
  std::byte* module_cache;
  int64_t module_capacity;
  int64_t *pending, *lengths;
  float* draft_probs;
  float temperature, top_p;
  int64_t top_k;
  const int64_t* seeds;
  std::byte* scratch;
};

// -1: the plan is wrong.
int64_t emulated_scratch_bytes(const EmulatedState* given) {
  recycle::Model model;
  if (recycle::read_plan(given->plan, given->plan_length, given->weights, given->weights_bytes, &model, false) !=
      nullptr)
    return -1;
  return recycle::cuda::decode_scratch_bytes(model, given->batch, given->num_draft_tokens, given->temperature == 0,
                                             kDevice);
}

// prefill_sequence: the sequence whose prefill ends; -1: none. Returns null, or what is wrong.
const char* emulated_decode_step(const EmulatedState* given, int64_t prefill_sequence, int64_t* tokens,
                                 int64_t* counts) {
  recycle::Model model;
  const char* wrong =
      recycle::read_plan(given->plan, given->plan_length, given->weights, given->weights_bytes, &model, false);
  if (wrong != nullptr) return wrong;
  const auto cache = [&](std::byte* data, int64_t capacity, const recycle::Stack& stack) {
    return recycle::KvCache{data,         static_cast<recycle::CacheType>(given->cache_type),
                            given->batch, stack.n_kv_heads,
                            capacity,     stack.head_dim};
  };
  recycle::DecodeState state;
  state.model = &model;
  state.batch = given->batch;
  state.num_draft_tokens = given->num_draft_tokens;
  state.mode = static_cast<recycle::Mode>(given->mode);
  state.base_cache = cache(given->base_cache, given->base_capacity, model.base.stack);
  if (given->num_draft_tokens > 0)
    state.module_cache = cache(given->module_cache, given->module_capacity, model.module.stack);
  state.pending = given->pending;
  state.lengths = given->lengths;
  state.draft_probs = given->draft_probs;
  state.sampling = {given->temperature, given->top_k, given->top_p, given->seeds};
  state.scratch = given->scratch;
  const bool started = prefill_sequence < 0
                           ? recycle::cuda::decode_step(state, tokens, counts, kDevice, nullptr)
                           : recycle::cuda::finish_prefill(state, prefill_sequence, tokens, counts, kDevice, nullptr);
  recycle::cuda::emulator::synchronize();
  return started ? nullptr : "a kernel was not launched";
}

// logits [rows, n] = W x, by the kernel of the LM head, without a norm.
void emulated_lm_head(const std::byte* weights, int64_t format, int64_t n, int64_t k, const float* x, int64_t rows,
                      float* logits) {
  const recycle::Matrix head{weights, static_cast<recycle::Format>(format), n, k};
  recycle::cuda::PartialArgmax partial;
  recycle::Arena sizes(nullptr);
  partial.take(sizes, kDevice, rows, head);
  std::vector<std::byte> scratch(sizes.used());
  recycle::Arena arena(scratch.data());
  partial.take(arena, kDevice, rows, head);
  recycle::cuda::Launcher launcher(kDevice, nullptr);
  recycle::cuda::lm_head(launcher, head, {x, nullptr, static_cast<int>(rows)}, logits, partial);
  recycle::cuda::emulator::synchronize();
}

}  // extern "C"
