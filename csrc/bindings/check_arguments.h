// The checks that the CPU's ops and the GPU's have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "check_tensor.h"
#include "recycle/attention.h"
#include "recycle/decode_step.h"
#include "recycle/format.h"
#include "recycle/head.h"
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

// attention_decode's arguments, but for the values of lengths.
inline AttentionParams check_attention(const char* op, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& cache, const Tensor& lengths,
                                       const Tensor& inv_freq, const std::optional<Tensor>& q_norm,
                                       const std::optional<Tensor>& k_norm, double eps,
                                       Place place) {
  check(op, "q", q, ScalarType::Float, {kAny, kAny, kAny, kAny}, place);
  AttentionParams params;
  params.batch = q.size(0);
  params.n_rows = q.size(1);
  params.n_heads = q.size(2);
  params.head_dim = q.size(3);
  check(op, "k", k, ScalarType::Float, {params.batch, params.n_rows, kAny, params.head_dim}, place);
  params.n_kv_heads = k.size(2);
  check(op, "v", v, ScalarType::Float,
        {params.batch, params.n_rows, params.n_kv_heads, params.head_dim}, place);
  if (params.batch < 1 || params.n_rows < 1 || params.n_kv_heads < 1)
    fail(op, "q and k must have at least one sequence, row and head");
  if (params.n_heads % params.n_kv_heads != 0)
    fail(op, "q has ", params.n_heads, " heads, k ", params.n_kv_heads,
         "; the first must be a multiple of the second");
  if (params.head_dim % kPanelRows != 0 || params.head_dim > 256 || params.head_dim < kPanelRows)
    fail(op, "q has head_dim ", params.head_dim, "; it must be a multiple of 16, at most 256");
  params.cache.type = cache_type(op, "cache", cache);
  check(
      op, "cache", cache, cache.scalar_type(),
      {2, params.batch, params.n_kv_heads, kAny, row_elements(params.cache.type, params.head_dim)},
      place);
  params.cache.data = data<std::byte>(cache);
  params.cache.n_sequences = params.batch;
  params.cache.n_kv_heads = params.n_kv_heads;
  params.cache.capacity = cache.size(3);
  params.cache.head_dim = params.head_dim;
  check(op, "lengths", lengths, ScalarType::Long, {params.batch}, place);
  params.lengths = const_data<int64_t>(lengths);
  check(op, "inv_freq", inv_freq, ScalarType::Float, {params.head_dim / 2}, place);
  if (q_norm.has_value()) check(op, "q_norm", *q_norm, ScalarType::Float, {params.head_dim}, place);
  if (k_norm.has_value()) check(op, "k_norm", *k_norm, ScalarType::Float, {params.head_dim}, place);
  params.q = const_data<float>(q);
  params.k = const_data<float>(k);
  params.v = const_data<float>(v);
  params.inv_freq = const_data<float>(inv_freq);
  params.q_norm = const_data<float>(q_norm);
  params.k_norm = const_data<float>(k_norm);
  params.eps = static_cast<float>(eps);
  return params;
}

inline HeadParams check_head(const char* op, const Tensor& hidden,
                             const std::optional<Tensor>& norm, double eps, const Tensor& head,
                             int64_t format, int64_t n_vocab, const Tensor& positions,
                             double temperature, int64_t top_k, double top_p, const Tensor& seeds,
                             Place place) {
  check(op, "hidden", hidden, ScalarType::Float, {kAny, kAny}, place);
  HeadParams params;
  params.n_rows = hidden.size(0);
  params.hidden = hidden.size(1);
  params.x = const_data<float>(hidden);
  if (params.n_rows < 1 || params.n_rows > kMaxHeadRows)
    fail(op, "hidden has ", params.n_rows, " rows; it must have 1 to ", kMaxHeadRows);
  if (norm.has_value()) check(op, "norm", *norm, ScalarType::Float, {params.hidden}, place);
  params.norm = const_data<float>(norm);
  params.eps = static_cast<float>(eps);
  if (format < 0 || format >= kFormats)
    fail(op, "format is ", format, "; it must be 0 to ", kFormats - 1,
         " (recycle_ext.weights.layout.FORMATS)");
  params.head.format = static_cast<Format>(format);
  if (params.hidden < 1 || params.hidden % k_multiple(params.head.format) != 0)
    fail(op, "hidden is ", params.hidden, " wide; this format needs a multiple of ",
         k_multiple(params.head.format));
  if (n_vocab < 1 || n_vocab > INT32_MAX)
    fail(op, "n_vocab is ", n_vocab, "; it must be 1 to ", INT32_MAX);
  check_bytes(op, "head", head, matrix_bytes(params.head.format, n_vocab, params.hidden), place);
  params.head.data = const_data<std::byte>(head);
  params.head.n = n_vocab;
  params.head.k = params.hidden;
  check(op, "positions", positions, ScalarType::Long, {params.n_rows}, place);
  params.positions = const_data<int64_t>(positions);
  params.sampling = check_sampling(op, temperature, top_k, top_p, seeds, params.n_rows, place);
  return params;
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
  state.num_draft_tokens = pending.size(1) - 1;
  const int64_t most = state.mode == Mode::standard ? 0 : kMaxDraftTokens;
  const int64_t fewest = state.mode == Mode::standard ? 0 : 1;
  if (state.batch < 1 || state.num_draft_tokens < fewest || state.num_draft_tokens > most)
    fail(op, "pending has shape ", shape_text(pending.sizes()), "; it must be [batch, 1 + drafts]",
         state.mode == Mode::standard ? " without drafts in standard mode" : " with 1 to 4 drafts");
  if (state.num_draft_tokens > 0 && !model->has_module)
    fail(op, "this mode needs a module, and the plan has none");
  state.pending = data<int64_t>(pending);
  check(op, "lengths", lengths, ScalarType::Long, {2, state.batch}, place);
  state.lengths = data<int64_t>(lengths);
  state.sampling = check_sampling(op, temperature, top_k, top_p, seeds, state.batch, place);
  state.base_cache =
      check_cache(op, "base_cache", base_cache, model->base.stack, state.batch, place);
  if (state.num_draft_tokens > 0)
    state.module_cache =
        check_cache(op, "module_cache", module_cache, model->module.stack, state.batch, place);
  if (state.mode == Mode::verify && !state.sampling.greedy()) {
    check(op, "draft_probs", draft_probs, ScalarType::Float,
          {state.batch, state.num_draft_tokens, model->module.head.n}, place);
    state.draft_probs = data<float>(draft_probs);
  }
  check_bytes(op, "scratch", scratch, scratch_bytes(state), place);
  state.scratch = data<std::byte>(scratch);
  return state;
}

inline int64_t capacity_of(const DecodeState& state) {
  return state.num_draft_tokens > 0
             ? std::min(state.base_cache.capacity, state.module_cache.capacity)
             : state.base_cache.capacity;
}

}  // namespace recycle::bindings
