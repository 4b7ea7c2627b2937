// The CUDA backend as a plain shared library for test_cuda_emulated.py: all "GPU memory" is the process's own.
#include "recycle/decode_step.h"
#include "recycle/model.h"
#include "step.h"

namespace {

// Enough for blocks to have several panels in turn, which the models of the tests else never need.
constexpr recycle::cuda::Device kDevice = {1, true, 227 * 1024};

}  // namespace

extern "C" {

struct EmulatedState {
  const int64_t* plan;
  int64_t plan_length;
  const std::byte* weights;
  int64_t weights_bytes;
  int64_t batch, drafts, mode;
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

int64_t emulated_scratch_bytes(const EmulatedState* given) {
  recycle::Model model;
  if (recycle::read_plan(given->plan, given->plan_length, given->weights, given->weights_bytes,
                         &model) != nullptr)
    return -1;
  return recycle::cuda::decode_scratch_bytes(model, given->batch, given->drafts,
                                             given->temperature == 0, kDevice);
}

// first_of: -1, or the sequence whose prefill ends.
const char* emulated_decode_step(const EmulatedState* given, int64_t first_of, int64_t* tokens,
                                 int64_t* counts) {
  recycle::Model model;
  const char* wrong = recycle::read_plan(given->plan, given->plan_length, given->weights,
                                         given->weights_bytes, &model);
  if (wrong != nullptr) return wrong;
  const auto cache = [&](std::byte* data, int64_t capacity, const recycle::Stack& stack) {
    return recycle::KvCache{data,         static_cast<recycle::CacheType>(given->cache_type),
                            given->batch, stack.n_kv_heads,
                            capacity,     stack.head_dim};
  };
  recycle::DecodeState state;
  state.model = &model;
  state.batch = given->batch;
  state.drafts = given->drafts;
  state.mode = static_cast<recycle::Mode>(given->mode);
  state.base_cache = cache(given->base_cache, given->base_capacity, model.base.stack);
  if (given->drafts > 0)
    state.module_cache = cache(given->module_cache, given->module_capacity, model.module.stack);
  state.pending = given->pending;
  state.lengths = given->lengths;
  state.draft_probs = given->draft_probs;
  state.sampling = {given->temperature, given->top_k, given->top_p, given->seeds};
  state.scratch = given->scratch;
  const bool started =
      first_of < 0
          ? recycle::cuda::decode_step(state, tokens, counts, kDevice, nullptr)
          : recycle::cuda::finish_prefill(state, first_of, tokens, counts, kDevice, nullptr);
  return started ? nullptr : "refused";
}

}  // extern "C"
