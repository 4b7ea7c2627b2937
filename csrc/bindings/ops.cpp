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

#include "check_arguments.h"
#include "check_tensor.h"
#include "recycle/attention.h"
#include "recycle/decode_step.h"
#include "recycle/format.h"
#include "recycle/head.h"
#include "recycle/model.h"
#include "recycle/parallel.h"

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
  AttentionParams params =
      check_attention(op, q, k, v, cache, lengths, inv_freq, q_norm, k_norm, eps, {});
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = params.lengths[b];
    if (length < 0 || length > params.cache.capacity - params.n_rows)
      fail(op, "lengths[", b, "] is ", length, " and ", params.n_rows,
           " rows are to be added, but cache has room for ", params.cache.capacity, " positions");
  }
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
  HeadParams params = check_head(op, hidden, norm, eps, head, format, n_vocab, positions,
                                 temperature, top_k, top_p, seeds, {});
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
  return decode_scratch_bytes(*state.model, state.batch, state.num_draft_tokens,
                              state.sampling.greedy(), n_threads());
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
  const int64_t room = positions_needed(state.num_draft_tokens);
  for (int64_t b = 0; b < state.batch; ++b) {
    const int64_t* tokens = state.pending + b * (state.num_draft_tokens + 1);
    if (tokens[0] < 0) continue;
    for (int64_t j = 0; j <= state.num_draft_tokens; ++j)
      if (tokens[j] < 0 || tokens[j] >= vocab)
        fail(op, "pending[", b, "][", j, "] is ", tokens[j], "; token ids are 0 to ", vocab - 1);
    const int64_t length = state.lengths[b];
    if (length < 0 || length > capacity_of(state) - room)
      fail(op, "lengths[0][", b, "] is ", length, " and a step needs ", room,
           " more positions, but the caches have room for ", capacity_of(state));
    const int64_t read = state.module_lengths()[b];
    if (state.num_draft_tokens > 0 && (read < 0 || read > length))
      fail(op, "lengths[1][", b, "] is ", read, "; the module may have read 0 to ", length,
           " positions, as many as the base");
  }
  Tensor tokens = torch::stable::empty_like(pending);
  Tensor counts = torch::stable::new_empty(lengths, {state.batch});
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
  const int64_t room = n_prompt + std::max<int64_t>(state.num_draft_tokens - 1, 0);
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
  // One decode step: the base model over the pending tokens [B, k + 1] of each sequence, the choice of what
  // counts, the module's new drafts. tokens [B, k + 1]: what each sequence grew by, then -1; counts [B].
  // lengths [2, B]: positions in the base's cache, and in the module's, which standard steps leave behind: it goes
  // on after them as if the text in between weren't there. So k may change from step to step.
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
