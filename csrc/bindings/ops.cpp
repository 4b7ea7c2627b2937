// The ops' schemas, the checks that only the CPU can make, and the calls to the CPU kernels. All of it uses the
// LibTorch Stable ABI: one build serves torch 2.10 and later.
//
// A call with wrong arguments raises a ValueError before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "check_arguments.h"
#include "interrupt.h"
#include "recycle/attention.h"
#include "recycle/decode_step.h"
#include "recycle/format.h"
#include "recycle/head.h"
#include "recycle/model.h"
#include "recycle/parallel.h"
#include "threads.h"

namespace recycle::bindings {

namespace {

void check_status(const char* op, const Status& status, const char* unit) {
  if (status.code == StatusCode::ok) return;
  std::ostringstream message;
  message << op << ": a logit is NaN or infinite (" << unit << " " << status.sequence << ", position "
          << status.position << ")";
  throw std::runtime_error(message.str());
}

// ---- attention_decode --------------------------------------------------------------------------------

Tensor attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& lengths,
                        const Tensor& inv_freq, const std::optional<Tensor>& q_norm,
                        const std::optional<Tensor>& k_norm, double eps) {
  const Checker checker{"attention_decode"};
  AttentionParams params = check_attention(checker, q, k, v, cache, lengths, inv_freq, q_norm, k_norm, eps);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = params.lengths[b];
    if (length < 0 || length > params.cache.capacity - params.n_rows)
      checker.fail("lengths[", b, "] is ", length, " and ", params.n_rows,
                   " rows are to be added, but cache has room for ", params.cache.capacity, " positions");
  }
  Tensor out = torch::stable::empty_like(q);
  params.out = data<float>(out);
  params.n_threads = n_threads();
  const int64_t bytes = attention_scratch_bytes(params.batch, params.n_rows, params.n_heads, params.n_kv_heads,
                                                params.head_dim, params.n_threads);
  const Tensor scratch = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  attention_decode(params);
  return out;
}

// ---- recycle_head ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> recycle_head(const Tensor& hidden, const std::optional<Tensor>& norm, double eps,
                                        const Tensor& head, int64_t format, int64_t n_vocab, const Tensor& positions,
                                        double temperature, int64_t top_k, double top_p, const Tensor& seeds) {
  const Checker checker{"recycle_head"};
  HeadParams params =
      check_head(checker, hidden, norm, eps, head, format, n_vocab, positions, temperature, top_k, top_p, seeds);
  Tensor tokens = torch::stable::new_empty(hidden, {params.n_rows}, ScalarType::Long);
  Tensor log_probs = torch::stable::new_empty(hidden, {params.n_rows});
  params.tokens = data<int64_t>(tokens);
  params.log_probs = data<float>(log_probs);
  params.n_threads = n_threads();
  const int64_t bytes =
      head_scratch_bytes(params.n_rows, params.hidden, n_vocab, params.sampling.greedy(), params.n_threads);
  const Tensor scratch = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  params.scratch = data<std::byte>(scratch);
  check_status(checker.op, recycle_head(params), "row");
  return {tokens, log_probs};
}

// ---- decode_step and prefill -------------------------------------------------------------------------

// scratch [threads, bytes]: a step runs on as many threads as its scratch has rows, so whoever owns the scratch has
// chosen their number.
void check_scratch(const Checker& checker, const Tensor& scratch, DecodeState* state) {
  const int64_t threads = scratch.dim() == 2 ? scratch.size(0) : 0;
  if (threads < 1 || threads > kMaxThreads)
    checker.fail("scratch has shape ", shape_text(scratch.sizes()), "; it must be [threads, bytes] with 1 to ",
                 kMaxThreads, " threads");
  checker.check("scratch", scratch, ScalarType::Byte, {threads, kAny});
  state->n_threads = static_cast<int>(threads);
  const int64_t needed = decode_scratch_bytes(*state->model, state->batch, state->num_draft_tokens,
                                              state->sampling.greedy(), state->n_threads);
  if (scratch.numel() < needed)
    checker.fail("scratch has shape ", shape_text(scratch.sizes()), ", ", scratch.numel(), " bytes; ", threads,
                 " threads need ", needed);
  state->scratch = checker.aligned("scratch", data<std::byte>(scratch));
}

std::tuple<Tensor, Tensor> decode_step(const Tensor& weights, const Tensor& plan, const Tensor& base_cache,
                                       const Tensor& module_cache, const Tensor& pending, const Tensor& lengths,
                                       const Tensor& draft_probs, const Tensor& scratch, int64_t mode,
                                       double temperature, int64_t top_k, double top_p, const Tensor& seeds) {
  const Checker checker{"decode_step"};
  Model model;
  DecodeState state = check_state(checker,
                                  {weights, plan, base_cache, module_cache, pending, lengths, draft_probs, scratch,
                                   mode, temperature, top_k, top_p, seeds},
                                  &model);
  check_scratch(checker, scratch, &state);
  const int64_t vocab = model.base.head.n;
  for (int64_t b = 0; b < state.batch; ++b) {
    const int64_t* tokens = state.pending + b * state.rows_per_sequence();
    if (tokens[0] < 0) continue;
    for (int64_t j = 0; j < state.rows_per_sequence(); ++j)
      if (tokens[j] < 0 || tokens[j] >= vocab)
        checker.fail("pending[", b, "][", j, "] is ", tokens[j], "; token ids are 0 to ", vocab - 1);
    const int64_t length = state.lengths[b];
    if (length < 0) checker.fail("lengths[0][", b, "] is ", length, "; it must be 0 or more");
    const int64_t read = state.module_lengths()[b];
    if (state.num_draft_tokens > 0 && (read < 0 || read > length))
      checker.fail("lengths[1][", b, "] is ", read, "; the module may have read 0 to ", length,
                   " positions, as many as the base");
  }
  Tensor tokens = torch::stable::empty_like(pending);
  Tensor counts = torch::stable::new_empty(lengths, {state.batch});
  decode_step(state, data<int64_t>(tokens), data<int64_t>(counts));
  return {tokens, counts};
}

void prefill(const Tensor& weights, const Tensor& plan, const Tensor& base_cache, const Tensor& module_cache,
             const Tensor& pending, const Tensor& lengths, const Tensor& draft_probs, const Tensor& scratch,
             int64_t mode, double temperature, int64_t top_k, double top_p, const Tensor& seeds, int64_t sequence,
             const Tensor& prompt) {
  const Checker checker{"prefill"};
  Model model;
  DecodeState state = check_state(checker,
                                  {weights, plan, base_cache, module_cache, pending, lengths, draft_probs, scratch,
                                   mode, temperature, top_k, top_p, seeds},
                                  &model);
  check_scratch(checker, scratch, &state);
  if (sequence < 0 || sequence >= state.batch)
    checker.fail("sequence is ", sequence, "; it must be 0 to ", state.batch - 1);
  const auto* ids = checker.input<int64_t>("prompt", prompt, {kAny});
  const int64_t n_prompt = prompt.numel();
  const int64_t vocab = model.base.head.n;
  if (n_prompt < 1) checker.fail("prompt is empty; it must have at least one token");
  for (int64_t i = 0; i < n_prompt; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) checker.fail("prompt[", i, "] is ", ids[i], "; token ids are 0 to ", vocab - 1);
  }
  const int64_t room = n_prompt + std::max<int64_t>(state.num_draft_tokens - 1, 0);
  if (room > capacity_of(state))
    checker.fail("prompt has ", n_prompt, " tokens, but the caches have room for ", capacity_of(state), " positions");
  const Status status = prefill(state, sequence, ids, n_prompt, interrupted);
  if (status.code == StatusCode::interrupted) throw_interrupt();
  check_status(checker.op, status, "sequence");
}

}  // namespace

}  // namespace recycle::bindings

// The schemas. An op writes to the arguments marked (a!), (b!), ... and to no others. decode_mode is not called mode,
// because torch's functionalization passes arguments by name to a function that has a `mode` of its own.
STABLE_TORCH_LIBRARY(recycle, m) {
  // RoPE (and Qwen3's norms of q and k), append to the cache, grouped-query attention. q, k, v: float32
  // [B, n_rows, heads, head_dim], new rows at positions lengths[b]..; cache: [2, B, n_kv_heads, capacity, head_dim],
  // in int8 head_dim + 4 (kv_cache.h).
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor lengths, "
      "Tensor inv_freq, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-5) -> Tensor");
  // RMSNorm, packed output matrix, softmax and the next token, for up to 64 rows [n_rows, hidden]: token ids and their
  // log-probabilities, [n_rows].
  m.def(
      "recycle_head(Tensor hidden, Tensor? norm, float eps, Tensor head, int format, int n_vocab, "
      "Tensor positions, float temperature, int top_k, float top_p, Tensor seeds) "
      "-> (Tensor tokens, Tensor log_probs)");
  // One decode step: the base model over the pending tokens [B, k + 1] of each sequence, which draft tokens are
  // accepted, the module's new draft tokens. tokens [B, k + 1]: what each sequence grew by, then -1; counts [B]: by how
  // much; 0 for an idle sequence, pending[b][0] < 0. A sequence that failed is unchanged, its tokens are all -1, and its
  // count says why: -1 a logit is not finite, -2 its caches have no room for another step, -3 (on a GPU) a pending token
  // is outside of the vocabulary. The other sequences of the batch go on.
  // Draft tokens may come from anywhere. Sampled verify mode takes their probabilities from draft_probs [B, k, draft
  // vocabulary]; outside of the draft vocabulary they are 0.
  // scratch: uint8 [threads, bytes]; the step runs on that many threads (_C.scratch_bytes()). On a GPU: [bytes].
  // lengths [2, B]: positions in the base model's cache, and in the module's. Standard steps leave the module out,
  // and k may change from step to step: the module continues as if the tokens in between were absent.
  m.def(
      "decode_step(Tensor weights, Tensor plan, Tensor(a!) base_cache, Tensor(b!) module_cache, "
      "Tensor(c!) pending, Tensor(d!) lengths, Tensor(e!) draft_probs, Tensor(f!) scratch, "
      "int decode_mode, float temperature, int top_k, float top_p, Tensor seeds) "
      "-> (Tensor tokens, Tensor counts)");
  // Fills the caches of one sequence with a prompt, and sets its pending tokens for decode_step. Raises a RuntimeError for
  // a logit that is not finite, and what a signal's handler raises (KeyboardInterrupt); the sequence is then idle.
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
