// The checks of each op's arguments, the same on CPU and GPU.
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

inline Sampling check_sampling(const Checker& checker, double temperature, int64_t top_k, double top_p,
                               const Tensor& seeds, int64_t n_seeds) {
  if (!(temperature >= 0) || std::isinf(temperature))
    checker.fail("temperature is ", temperature, "; it must be 0 (greedy) or a positive number");
  if (top_k < 0) checker.fail("top_k is ", top_k, "; it must be 0 (all tokens) or positive");
  if (!(top_p > 0 && top_p <= 1)) checker.fail("top_p is ", top_p, "; it must be in (0, 1]");
  // As near 0 as a temperature can come, a sampler is greedy, and 1 / temperature must not be infinite before.
  const double in_range = temperature == 0 ? 0 : std::clamp(temperature, 0x1p-126, 0x1p126);
  return {static_cast<float>(in_range), top_k, static_cast<float>(top_p),
          checker.input<int64_t>("seeds", seeds, {n_seeds})};
}

// A cache [n_layers, 2, batch, n_kv_heads, capacity, row], or without the first dimension (n_layers 0).
inline KvCache check_cache(const Checker& checker, const char* name, const Tensor& cache, int64_t n_layers,
                           int64_t batch, int64_t n_kv_heads, int64_t head_dim) {
  KvCache view;
  const ScalarType dtype = cache.scalar_type();
  if (dtype == ScalarType::Float)
    view.type = CacheType::f32;
  else if (dtype == ScalarType::BFloat16)
    view.type = CacheType::bf16;
  else if (dtype == ScalarType::Char)
    view.type = CacheType::q8;
  else
    checker.fail(name, " is ", name_of(dtype), "; it must be float32, bfloat16 or int8");
  const int64_t row = view.type == CacheType::q8 ? head_dim + kScaleBytes : head_dim;  // elements
  if (n_layers == 0)
    checker.check(name, cache, dtype, {2, batch, n_kv_heads, kAny, row});
  else
    checker.check(name, cache, dtype, {n_layers, 2, batch, n_kv_heads, kAny, row});
  view.data = data<std::byte>(cache);
  view.n_sequences = batch;
  view.n_kv_heads = n_kv_heads;
  view.capacity = cache.size(n_layers == 0 ? 3 : 4);
  view.head_dim = head_dim;
  return view;
}

// attention_decode, except the values of lengths.
inline AttentionParams check_attention(const Checker& checker, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& cache, const Tensor& lengths, const Tensor& inv_freq,
                                       const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                                       double eps) {
  AttentionParams params;
  params.q = checker.input<float>("q", q, {kAny, kAny, kAny, kAny});
  params.batch = q.size(0);
  params.n_rows = q.size(1);
  params.n_heads = q.size(2);
  params.head_dim = q.size(3);
  params.k = checker.input<float>("k", k, {params.batch, params.n_rows, kAny, params.head_dim});
  params.n_kv_heads = k.size(2);
  params.v = checker.input<float>("v", v, {params.batch, params.n_rows, params.n_kv_heads, params.head_dim});
  if (params.batch < 1 || params.n_rows < 1 || params.n_kv_heads < 1)
    checker.fail("q and k must have at least one sequence, row and head");
  if (params.n_heads % params.n_kv_heads != 0)
    checker.fail("q has ", params.n_heads, " heads, k ", params.n_kv_heads,
                 "; the first must be a multiple of the second");
  if (params.head_dim % kPanelRows != 0 || params.head_dim > 256 || params.head_dim < kPanelRows)
    checker.fail("q has head_dim ", params.head_dim, "; it must be a multiple of 16, at most 256");
  params.cache = check_cache(checker, "cache", cache, 0, params.batch, params.n_kv_heads, params.head_dim);
  params.lengths = checker.input<int64_t>("lengths", lengths, {params.batch});
  params.inv_freq = checker.input<float>("inv_freq", inv_freq, {params.head_dim / 2});
  params.q_norm = checker.optional_vector("q_norm", q_norm, params.head_dim);
  params.k_norm = checker.optional_vector("k_norm", k_norm, params.head_dim);
  params.eps = static_cast<float>(eps);
  return params;
}

inline HeadParams check_head(const Checker& checker, const Tensor& hidden, const std::optional<Tensor>& norm,
                             double eps, const Tensor& head, int64_t format, int64_t n_vocab, const Tensor& positions,
                             double temperature, int64_t top_k, double top_p, const Tensor& seeds) {
  HeadParams params;
  params.x = checker.input<float>("hidden", hidden, {kAny, kAny});
  params.n_rows = hidden.size(0);
  params.hidden = hidden.size(1);
  if (params.n_rows < 1 || params.n_rows > kMaxHeadRows)
    checker.fail("hidden has ", params.n_rows, " rows; it must have 1 to ", kMaxHeadRows);
  params.norm = checker.optional_vector("norm", norm, params.hidden);
  params.eps = static_cast<float>(eps);
  if (format < 0 || format >= kFormats)
    checker.fail("format is ", format, "; it must be 0 to ", kFormats - 1, " (recycle_ext.weights.layout.FORMATS)");
  params.head.format = static_cast<Format>(format);
  if (params.hidden < 1 || params.hidden % k_multiple(params.head.format) != 0)
    checker.fail("hidden has ", params.hidden, " columns; this format needs a multiple of ",
                 k_multiple(params.head.format));
  if (n_vocab < 1 || n_vocab > INT32_MAX) checker.fail("n_vocab is ", n_vocab, "; it must be 1 to ", INT32_MAX);
  params.head.data = checker.bytes("head", head, matrix_bytes(params.head.format, n_vocab, params.hidden));
  params.head.n = n_vocab;
  params.head.k = params.hidden;
  params.positions = checker.input<int64_t>("positions", positions, {params.n_rows});
  params.sampling = check_sampling(checker, temperature, top_k, top_p, seeds, params.n_rows);
  return params;
}

inline void check_plan(const Checker& checker, const Tensor& plan, const std::byte* weights, int64_t weights_bytes,
                       bool readable, Model* model) {
  const auto* table = Checker{checker.op}.input<int64_t>("plan", plan, {kAny});  // always the CPU's
  const char* error = read_plan(table, plan.numel(), weights, weights_bytes, model, readable);
  if (error != nullptr) checker.fail("plan and weights don't fit: ", error);
}

// The arguments that decode_step, prefill and finish_prefill have in common.
struct StepArguments {
  const Tensor &weights, &plan, &base_cache, &module_cache, &pending, &lengths, &draft_probs, &scratch;
  int64_t mode;
  double temperature;
  int64_t top_k;
  double top_p;
  const Tensor& seeds;
};

// Checks all of them but scratch, which differs between CPU and GPU, and reads *model from the plan.
inline DecodeState check_state(const Checker& checker, const StepArguments& given, Model* model) {
  check_plan(checker, given.plan, checker.bytes("weights", given.weights, 0), given.weights.numel(), checker.gpu < 0,
             model);
  DecodeState state;
  state.model = model;
  if (given.mode < 0 || given.mode > 2)
    checker.fail("decode_mode is ", given.mode, "; it must be 0 (standard), 1 (verify) or 2 (alternate)");
  state.mode = static_cast<Mode>(given.mode);
  const bool drafts = state.mode != Mode::standard;
  state.pending = checker.output<int64_t>("pending", given.pending, {kAny, kAny});
  state.batch = given.pending.size(0);
  state.num_draft_tokens = given.pending.size(1) - 1;
  if (state.batch < 1 || state.num_draft_tokens < (drafts ? 1 : 0) ||
      state.num_draft_tokens > (drafts ? kMaxDraftTokens : 0))
    checker.fail("pending has shape ", shape_text(given.pending.sizes()), "; it must be [batch, 1 + drafts]",
                 drafts ? " with 1 to 4 drafts" : " without drafts in standard mode");
  if (drafts && !model->has_module) checker.fail("this mode needs a module, and the plan has none");
  state.lengths = checker.output<int64_t>("lengths", given.lengths, {2, state.batch});
  state.sampling = check_sampling(checker, given.temperature, given.top_k, given.top_p, given.seeds, state.batch);
  const auto cache = [&](const char* name, const Tensor& tensor, const Stack& stack) {
    return check_cache(checker, name, tensor, stack.n_layers, state.batch, stack.n_kv_heads, stack.head_dim);
  };
  state.base_cache = cache("base_cache", given.base_cache, model->base.stack);
  if (drafts) state.module_cache = cache("module_cache", given.module_cache, model->module.stack);
  if (state.mode == Mode::verify && !state.sampling.greedy())
    state.draft_probs = checker.output<float>("draft_probs", given.draft_probs,
                                              {state.batch, state.num_draft_tokens, model->module.head.n});
  return state;
}

inline int64_t capacity_of(const DecodeState& state) {
  return state.num_draft_tokens > 0 ? std::min(state.base_cache.capacity, state.module_cache.capacity)
                                    : state.base_cache.capacity;
}

}  // namespace recycle::bindings
