// The checks that the CPU's ops and the GPU's have in common.
#pragma once

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "recycle/decode_step.h"
#include "recycle/kv_cache.h"
#include "recycle/model.h"

namespace recycle::bindings {

inline CacheType cache_type(const char* op, const char* name, const Tensor& cache) {
  const ScalarType type = cache.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Char)
    fail(op, name, " is ", name_of(type), "; it must be float32, bfloat16 or int8");
  return type == ScalarType::Float      ? CacheType::f32
         : type == ScalarType::BFloat16 ? CacheType::bf16
                                        : CacheType::q8;
}

// Elements of a row: an int8 one carries its scale.
inline int64_t row_elements(CacheType type, int64_t head_dim) {
  return type == CacheType::q8 ? head_dim + kScaleBytes : head_dim;
}

inline Sampling check_sampling(const char* op, double temperature, int64_t top_k, double top_p,
                               const Tensor& seeds, int64_t n_seeds, Place place = {}) {
  if (!(temperature >= 0) || std::isinf(temperature))
    fail(op, "temperature is ", temperature, "; it must be 0 (greedy) or a positive number");
  if (top_k < 0) fail(op, "top_k is ", top_k, "; it must be 0 (all tokens) or positive");
  if (!(top_p > 0 && top_p <= 1)) fail(op, "top_p is ", top_p, "; it must be in (0, 1]");
  check(op, "seeds", seeds, ScalarType::Long, {n_seeds}, place);
  return {static_cast<float>(temperature), top_k, static_cast<float>(top_p),
          const_data<int64_t>(seeds)};
}

inline KvCache check_cache(const char* op, const char* name, const Tensor& cache,
                           const Stack& stack, int64_t batch, Place place) {
  KvCache view;
  view.type = cache_type(op, name, cache);
  check(op, name, cache, cache.scalar_type(),
        {stack.n_layers, 2, batch, stack.n_kv_heads, kAny, row_elements(view.type, stack.head_dim)},
        place);
  view.data = data<std::byte>(cache);
  view.n_sequences = batch;
  view.n_kv_heads = stack.n_kv_heads;
  view.capacity = cache.size(4);
  view.head_dim = stack.head_dim;
  return view;
}

// What decode_step and prefill are given, checked: all of it at `place`, but for the plan, which is the CPU's. The
// model is read from the plan into *model.
template <class ScratchBytes>
DecodeState check_state(const char* op, const Tensor& weights, const Tensor& plan,
                        const Tensor& base_cache, const Tensor& module_cache, const Tensor& pending,
                        const Tensor& lengths, const Tensor& draft_probs, const Tensor& scratch,
                        int64_t mode, double temperature, int64_t top_k, double top_p,
                        const Tensor& seeds, Model* model, Place place,
                        ScratchBytes scratch_bytes) {
  check_bytes(op, "weights", weights, 0, place);
  check(op, "plan", plan, ScalarType::Long, {kAny});
  const char* wrong =
      read_plan(const_data<int64_t>(plan), plan.numel(), const_data<std::byte>(weights),
                weights.numel(), model, place.gpu < 0);
  if (wrong != nullptr) fail(op, "plan and weights don't fit: ", wrong);

  DecodeState state;
  state.model = model;
  if (mode < 0 || mode > 2)
    fail(op, "decode_mode is ", mode, "; it must be 0 (standard), 1 (verify) or 2 (alternate)");
  state.mode = static_cast<Mode>(mode);
  check(op, "pending", pending, ScalarType::Long, {kAny, kAny}, place);
  state.batch = pending.size(0);
  state.drafts = pending.size(1) - 1;
  const int64_t most = state.mode == Mode::standard ? 0 : kMaxDrafts;
  const int64_t fewest = state.mode == Mode::standard ? 0 : 1;
  if (state.batch < 1 || state.drafts < fewest || state.drafts > most)
    fail(op, "pending has shape ", shape_text(pending.sizes()), "; it must be [batch, 1 + drafts]",
         state.mode == Mode::standard ? " without drafts in standard mode" : " with 1 to 4 drafts");
  if (state.drafts > 0 && !model->has_module)
    fail(op, "this mode needs a module, and the plan has none");
  state.pending = data<int64_t>(pending);
  check(op, "lengths", lengths, ScalarType::Long, {state.batch}, place);
  state.lengths = data<int64_t>(lengths);
  state.sampling = check_sampling(op, temperature, top_k, top_p, seeds, state.batch, place);
  state.base_cache =
      check_cache(op, "base_cache", base_cache, model->base.stack, state.batch, place);
  if (state.drafts > 0)
    state.module_cache =
        check_cache(op, "module_cache", module_cache, model->module.stack, state.batch, place);
  if (state.mode == Mode::verify && !state.sampling.greedy()) {
    check(op, "draft_probs", draft_probs, ScalarType::Float,
          {state.batch, state.drafts, model->module.head.n}, place);
    state.draft_probs = data<float>(draft_probs);
  }
  check_bytes(op, "scratch", scratch, scratch_bytes(state), place);
  state.scratch = data<std::byte>(scratch);
  return state;
}

inline int64_t capacity_of(const DecodeState& state) {
  return state.drafts > 0 ? std::min(state.base_cache.capacity, state.module_cache.capacity)
                          : state.base_cache.capacity;
}

}  // namespace recycle::bindings
