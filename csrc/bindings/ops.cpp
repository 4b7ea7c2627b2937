// The ops' schemas, their argument checks, and the calls to the CPU kernels. Everything goes through the
// LibTorch Stable ABI, so that one build serves torch 2.10 and later.
//
// Whatever a call may be given, it either works or raises a ValueError before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "recycle/attention.h"
#include "recycle/decode_step.h"
#include "recycle/format.h"
#include "recycle/head.h"
#include "recycle/model.h"
#include "recycle/parallel.h"
#include "state.h"

namespace recycle::bindings {

namespace {

[[noreturn]] void fail_non_finite(const char* op, const Status& status, const char* unit) {
  std::ostringstream message;
  message << op << ": a logit is NaN or infinite (" << unit << " " << status.sequence
          << ", position " << status.position << ")";
  throw std::runtime_error(message.str());
}

// ---- attention_decode --------------------------------------------------------------------------------

Tensor attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache,
                        const Tensor& lengths, const Tensor& inv_freq,
                        const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                        double eps) {
  constexpr const char* op = "attention_decode";
  check(op, "q", q, ScalarType::Float, {kAny, kAny, kAny, kAny});
  AttentionParams params;
  params.batch = q.size(0);
  params.n_rows = q.size(1);
  params.n_heads = q.size(2);
  params.head_dim = q.size(3);
  check(op, "k", k, ScalarType::Float, {params.batch, params.n_rows, kAny, params.head_dim});
  params.n_kv_heads = k.size(2);
  check(op, "v", v, ScalarType::Float,
        {params.batch, params.n_rows, params.n_kv_heads, params.head_dim});
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
      {2, params.batch, params.n_kv_heads, kAny, row_elements(params.cache.type, params.head_dim)});
  params.cache.data = data<std::byte>(cache);
  params.cache.n_sequences = params.batch;
  params.cache.n_kv_heads = params.n_kv_heads;
  params.cache.capacity = cache.size(3);
  params.cache.head_dim = params.head_dim;
  check(op, "lengths", lengths, ScalarType::Long, {params.batch});
  params.lengths = const_data<int64_t>(lengths);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = params.lengths[b];
    if (length < 0 || length > params.cache.capacity - params.n_rows)
      fail(op, "lengths[", b, "] is ", length, " and ", params.n_rows,
           " rows are to be added, but cache has room for ", params.cache.capacity, " positions");
  }
  check(op, "inv_freq", inv_freq, ScalarType::Float, {params.head_dim / 2});
  if (q_norm.has_value()) check(op, "q_norm", *q_norm, ScalarType::Float, {params.head_dim});
  if (k_norm.has_value()) check(op, "k_norm", *k_norm, ScalarType::Float, {params.head_dim});
  params.q = const_data<float>(q);
  params.k = const_data<float>(k);
  params.v = const_data<float>(v);
  params.inv_freq = const_data<float>(inv_freq);
  params.q_norm = const_data<float>(q_norm);
  params.k_norm = const_data<float>(k_norm);
  params.eps = static_cast<float>(eps);

  Tensor out = torch::stable::empty_like(q);
  params.out = data<float>(out);
  const int64_t bytes = attention_scratch_bytes(params.batch, params.n_rows, params.n_heads,
                                                params.n_kv_heads, params.head_dim, n_threads());
  const Tensor scratch = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  attention_decode(params);
  return out;
}

// ---- recycle_head ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> recycle_head(const Tensor& hidden, const std::optional<Tensor>& norm,
                                        double eps, const Tensor& head, int64_t format,
                                        int64_t n_vocab, const Tensor& positions,
                                        double temperature, int64_t top_k, double top_p,
                                        const Tensor& seeds) {
  constexpr const char* op = "recycle_head";
  check(op, "hidden", hidden, ScalarType::Float, {kAny, kAny});
  HeadParams params;
  params.n_rows = hidden.size(0);
  params.hidden = hidden.size(1);
  params.x = const_data<float>(hidden);
  if (params.n_rows < 1 || params.n_rows > kMaxHeadRows)
    fail(op, "hidden has ", params.n_rows, " rows; it must have 1 to ", kMaxHeadRows);
  if (norm.has_value()) check(op, "norm", *norm, ScalarType::Float, {params.hidden});
  params.norm = const_data<float>(norm);
  params.eps = static_cast<float>(eps);
  if (format < 0 || format >= kFormats)
    fail(op, "format is ", format, "; it must be 0 to ", kFormats - 1,
         " (recycle_ext.packing.FORMATS)");
  params.head.format = static_cast<Format>(format);
  if (params.hidden < 1 || params.hidden % k_multiple(params.head.format) != 0)
    fail(op, "hidden is ", params.hidden, " wide; this format needs a multiple of ",
         k_multiple(params.head.format));
  if (n_vocab < 1 || n_vocab > INT32_MAX)
    fail(op, "n_vocab is ", n_vocab, "; it must be 1 to ", INT32_MAX);
  check_bytes(op, "head", head, matrix_bytes(params.head.format, n_vocab, params.hidden));
  params.head.data = const_data<std::byte>(head);
  params.head.n = n_vocab;
  params.head.k = params.hidden;
  check(op, "positions", positions, ScalarType::Long, {params.n_rows});
  params.positions = const_data<int64_t>(positions);
  params.sampling = check_sampling(op, temperature, top_k, top_p, seeds, params.n_rows);

  Tensor tokens = torch::stable::new_empty(hidden, {params.n_rows}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(hidden, {params.n_rows});
  params.tokens = data<int64_t>(tokens);
  params.log_probs = data<float>(log_probs);
  const int64_t bytes = head_scratch_bytes(params.n_rows, params.hidden, n_vocab,
                                           params.sampling.greedy(), n_threads());
  const Tensor scratch = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  const Status status = recycle_head(params);
  if (status.code != StatusCode::ok) fail_non_finite(op, status, "row");
  return {tokens, log_probs};
}

// ---- decode_step and prefill -------------------------------------------------------------------------

int64_t scratch_bytes(const DecodeState& state) {
  return decode_scratch_bytes(*state.model, state.batch, state.drafts, state.sampling.greedy(),
                              n_threads());
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& weights, const Tensor& plan,
                                       const Tensor& base_cache, const Tensor& module_cache,
                                       const Tensor& pending, const Tensor& lengths,
                                       const Tensor& draft_probs, const Tensor& scratch,
                                       int64_t mode, double temperature, int64_t top_k,
                                       double top_p, const Tensor& seeds) {
  constexpr const char* op = "decode_step";
  Model model;
  const DecodeState state =
      check_state(op, weights, plan, base_cache, module_cache, pending, lengths, draft_probs,
                  scratch, mode, temperature, top_k, top_p, seeds, &model, {}, scratch_bytes);
  const int64_t vocab = model.base.head.n;
  const int64_t room = positions_needed(state.drafts);
  for (int64_t b = 0; b < state.batch; ++b) {
    const int64_t* tokens = state.pending + b * (state.drafts + 1);
    if (tokens[0] < 0) continue;
    for (int64_t j = 0; j <= state.drafts; ++j)
      if (tokens[j] < 0 || tokens[j] >= vocab)
        fail(op, "pending[", b, "][", j, "] is ", tokens[j], "; token ids are 0 to ", vocab - 1);
    const int64_t length = state.lengths[b];
    if (length < 0 || length > capacity_of(state) - room)
      fail(op, "lengths[", b, "] is ", length, " and a step needs ", room,
           " more positions, but the caches have room for ", capacity_of(state));
  }
  Tensor tokens = torch::stable::empty_like(pending);
  Tensor counts = torch::stable::empty_like(lengths);
  const Status status = decode_step(state, data<int64_t>(tokens), data<int64_t>(counts));
  if (status.code != StatusCode::ok) fail_non_finite(op, status, "sequence");
  return {tokens, counts};
}

void prefill(const Tensor& weights, const Tensor& plan, const Tensor& base_cache,
             const Tensor& module_cache, const Tensor& pending, const Tensor& lengths,
             const Tensor& draft_probs, const Tensor& scratch, int64_t mode, double temperature,
             int64_t top_k, double top_p, const Tensor& seeds, int64_t sequence,
             const Tensor& prompt) {
  constexpr const char* op = "prefill";
  Model model;
  const DecodeState state =
      check_state(op, weights, plan, base_cache, module_cache, pending, lengths, draft_probs,
                  scratch, mode, temperature, top_k, top_p, seeds, &model, {}, scratch_bytes);
  if (sequence < 0 || sequence >= state.batch)
    fail(op, "sequence is ", sequence, "; it must be 0 to ", state.batch - 1);
  check(op, "prompt", prompt, ScalarType::Long, {kAny});
  const int64_t n_prompt = prompt.numel();
  const int64_t vocab = model.base.head.n;
  if (n_prompt < 1) fail(op, "prompt is empty; it must have at least one token");
  for (int64_t i = 0; i < n_prompt; ++i) {
    const int64_t token = const_data<int64_t>(prompt)[i];
    if (token < 0 || token >= vocab)
      fail(op, "prompt[", i, "] is ", token, "; token ids are 0 to ", vocab - 1);
  }
  const int64_t room = n_prompt + std::max<int64_t>(state.drafts - 1, 0);
  if (room > capacity_of(state))
    fail(op, "prompt has ", n_prompt, " tokens, but the caches have room for ", capacity_of(state),
         " positions");
  const Status status = prefill(state, sequence, const_data<int64_t>(prompt), n_prompt);
  if (status.code != StatusCode::ok) fail_non_finite(op, status, "sequence");
}

}  // namespace

}  // namespace recycle::bindings

// The schemas. What is marked (a!) is written to; nothing else is. decode_mode is not called mode because
// torch's functionalization passes arguments by name to a function that has a `mode` of its own.
STABLE_TORCH_LIBRARY(recycle, m) {
  // RoPE (and Qwen3's norms of q and k), append to the cache, grouped-query attention: float32 q, k, v of
  // n_rows new rows a sequence, at positions lengths[b]..; cache [2, B, n_kv_heads, capacity, head_dim], or
  // head_dim + 4 in int8 (kv_cache.h).
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor lengths, "
      "Tensor inv_freq, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-5) -> Tensor");
  // RMSNorm, packed output matrix, softmax and pick, for up to 64 rows: token ids and their
  // log-probabilities.
  m.def(
      "recycle_head(Tensor hidden, Tensor? norm, float eps, Tensor head, int format, int n_vocab, "
      "Tensor positions, float temperature, int top_k, float top_p, Tensor seeds) "
      "-> (Tensor tokens, Tensor log_probs)");
  // One decode step: the base model over the pending tokens of each sequence, the choice of what counts,
  // the module's new drafts. tokens [B, k + 1]: what each sequence grew by, then -1; counts [B].
  m.def(
      "decode_step(Tensor weights, Tensor plan, Tensor(a!) base_cache, Tensor(b!) module_cache, "
      "Tensor(c!) pending, Tensor(d!) lengths, Tensor(e!) draft_probs, Tensor(f!) scratch, "
      "int decode_mode, float temperature, int top_k, float top_p, Tensor seeds) "
      "-> (Tensor tokens, Tensor counts)");
  // A prompt into the caches of one sequence: its pending tokens are ready for decode_step afterwards.
  m.def(
      "prefill(Tensor weights, Tensor plan, Tensor(a!) base_cache, Tensor(b!) module_cache, "
      "Tensor(c!) pending, Tensor(d!) lengths, Tensor(e!) draft_probs, Tensor(f!) scratch, "
      "int decode_mode, float temperature, int top_k, float top_p, Tensor seeds, int sequence, "
      "Tensor prompt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recycle, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&recycle::bindings::attention_decode));
  m.impl("recycle_head", TORCH_BOX(&recycle::bindings::recycle_head));
  m.impl("decode_step", TORCH_BOX(&recycle::bindings::decode_step));
  m.impl("prefill", TORCH_BOX(&recycle::bindings::prefill));
}
