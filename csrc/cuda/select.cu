// The kernels between the passes (select.h): embeddings, the accepted draft tokens, new draft tokens.
//
//   pending [batch, rows_per_sequence] -> x [rows, hidden] -> tokens, counts -> module_input [rows, 2 hidden]
//
// One block a row or a sequence. Bounded by the latency of a few dependent reads: some microseconds a step.
#include "select.h"

#include "recycle/choice.h"
#include "sampling.h"

namespace recycle::cuda {

namespace {

constexpr int kThreads = kSampleThreads;

// ---- inputs of the passes -----------------------------------------------------------------------------

// out = x / sqrt(mean(x^2) + eps) * weight, or x where `weight` is null. All threads call; out may be x.
RECYCLE_DEVICE void norm_row(const float* x, const float* weight, float eps, int64_t n, float* out) {
  float scale = 1;
  if (weight != nullptr) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) sum = fmaf(x[i], x[i], sum);
    sum = block_sum(shared_memory<float>(), kSampleWarps, sum);
    scale = 1 / sqrtf(sum / static_cast<float>(n) + eps);
  }
  for (int64_t i = threadIdx.x; i < n; i += kThreads) out[i] = weight != nullptr ? x[i] * scale * weight[i] : x[i];
}

// A row of the module's input: the embedding of the token after a position, and the hidden state at the position.
RECYCLE_DEVICE void write_module_input(const SelectParams& params, int64_t token, int position, const float* hidden,
                                       const float* final_norm, float* input) {
  const bool zero = params.zero_first_embedding && position == 0;
  for (int64_t i = threadIdx.x; i < params.hidden; i += kThreads)
    input[i] = zero ? 0 : read_weight(params.embedding, token, i);
  norm_row(input, params.embed_norm, params.module_eps, params.hidden, input);
  float* state = input + params.hidden;
  norm_row(hidden, final_norm, params.base_eps, params.hidden, state);
  if (params.hidden_norm != nullptr) norm_row(state, params.hidden_norm, params.module_eps, params.hidden, state);
}

// An unused row still passes through the module: its input must be finite.
RECYCLE_DEVICE void clear_module_input(const SelectParams& params, float* input) {
  for (int64_t i = threadIdx.x; i < 2 * params.hidden; i += kThreads) input[i] = 0;
}

RECYCLE_DEVICE bool is_token(const SelectParams& params, int64_t id) { return id >= 0 && id < params.vocab; }

// One block a row.
__global__ void __launch_bounds__(kThreads, 1) begin_kernel(SelectParams params) {
  launch_dependents();
  grid_dependency_wait();
  const SelectBuffers& buffers = params.buffers;
  const int row = blockIdx.x;
  const int sequence = row / params.rows_per_sequence;
  const int row_in_sequence = row % params.rows_per_sequence;
  const int64_t* pending = params.pending + sequence * params.rows_per_sequence;
  const int64_t length = params.lengths[sequence];
  const bool is_idle = pending[0] < 0 || (params.prefill_sequence >= 0 && sequence != params.prefill_sequence);
  // The end of a prefill writes one row in the base model, and one for each draft token in the module.
  const int64_t needed = params.prefill_sequence < 0   ? positions_needed(params.num_draft_tokens)
                         : params.num_draft_tokens > 0 ? params.num_draft_tokens
                                                       : 1;
  bool fits = length >= 0 && length <= params.capacity - needed;
  if (params.num_draft_tokens > 0) {
    const int64_t module_length = params.module_lengths[sequence];
    fits = fits && module_length >= 0 && module_length <= length;
  }
  bool are_tokens = true;
  for (int j = 0; j <= params.last_row; ++j) are_tokens = are_tokens && is_token(params, pending[j]);
  const bool is_used = !is_idle && fits && are_tokens && row_in_sequence <= params.last_row;
  for (int64_t i = threadIdx.x; i < params.hidden; i += kThreads)
    buffers.x[row * params.hidden + i] = is_used ? read_weight(params.embedding, pending[row_in_sequence], i) : 0;
  if (row == 0)
    for (int i = threadIdx.x; i < buffers.n_counters; i += kThreads) buffers.blocks_done[i] = 0;
  if (threadIdx.x != 0) return;
  buffers.positions[row] = is_used ? static_cast<int>(length) + row_in_sequence : -1;
  if (params.head_reads_every_row)
    buffers.head_rows[row] = row;
  else if (row < params.batch)
    buffers.head_rows[row] = row * params.rows_per_sequence + params.last_row;
  if (row_in_sequence != 0) return;
  params.counts[sequence] = is_idle ? 0 : !fits ? kNoRoom : !are_tokens ? kBadToken : 1;
  for (int j = 0; j < params.rows_per_sequence; ++j) {
    buffers.new_pending[row + j] = pending[j];
    params.tokens[row + j] = -1;
  }
}

// ---- accepted tokens --------------------------------------------------------------------------------------

RECYCLE_DEVICE float random(const SelectParams& params, int sequence, int64_t position, Stream stream) {
  return uniform(static_cast<uint64_t>(params.seeds[sequence]), static_cast<uint64_t>(position), stream);
}

// The token of a row of the module's head. No one has checked the ids of a draft vocabulary in a GPU's memory, so that
// this may be no token, see is_token().
RECYCLE_DEVICE int64_t draft_id(const SelectParams& params, int64_t row) {
  return params.draft_vocab != nullptr ? params.draft_vocab[row] : row;
}

// The probability that a pending draft token was drawn with: 0 outside of the draft vocabulary, which ascends.
// q: [draft vocabulary]
RECYCLE_DEVICE float draft_prob(const SelectParams& params, const float* q, int64_t token) {
  if (params.draft_vocab == nullptr) return q[token];
  int64_t low = 0, high = params.draft_vocab_size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (params.draft_vocab[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low < params.draft_vocab_size && params.draft_vocab[low] == token ? q[low] : 0;
}

// Speculative sampling, see choice.h. length: the position of the sequence's first row.
RECYCLE_DEVICE Choice verify_sampled(const SelectParams& params, int sequence, int length) {
  const int64_t* pending = params.pending + sequence * params.rows_per_sequence;
  float* p = params.buffers.base_probs + int64_t{sequence} * params.rows_per_sequence * params.vocab;
  const float* q = params.draft_probs + int64_t{sequence} * params.num_draft_tokens * params.draft_vocab_size;
  for (int j = 0; j < params.num_draft_tokens; ++j) {
    const int64_t token = pending[j + 1];
    const int64_t position = length + j + 1;
    if (accepts_draft(random(params, sequence, position, Stream::accept), p[token], draft_prob(params, q, token))) {
      p += params.vocab;
      q += params.draft_vocab_size;
      continue;
    }
    __syncthreads();  // all threads have read p[token]
    for (int64_t i = threadIdx.x; i < params.draft_vocab_size; i += kThreads) {
      const int64_t id = draft_id(params, i);
      if (is_token(params, id)) p[id] = residual(p[id], q[i]);
    }
    __syncthreads();
    return {j, sample(p, params.vocab, random(params, sequence, position, Stream::resample))};
  }
  return {params.num_draft_tokens,
          sample(p, params.vocab, random(params, sequence, length + params.rows_per_sequence, Stream::sample))};
}

// False if a logit of the sequence is nonfinite.
RECYCLE_DEVICE bool choose(const SelectParams& params, int sequence, int length, Choice* choice) {
  const int n_head_rows = params.head_reads_every_row ? params.rows_per_sequence : 1;
  const int first = sequence * n_head_rows;
  if (params.is_sampled) {
    for (int j = 0; j < n_head_rows; ++j)
      if (params.buffers.base_finite[first + j] == 0) return false;
    if (params.head_reads_every_row)
      *choice = verify_sampled(params, sequence, length);
    else
      *choice = {params.last_row, sample(params.buffers.base_probs + first * params.vocab, params.vocab,
                                         random(params, sequence, length + params.last_row + 1, Stream::sample))};
    return true;
  }
  int tokens[kMaxDraftTokens + 1];
  bool is_finite = true;
  for (int j = 0; j < n_head_rows; ++j) {
    tokens[j] = argmax(params.partial, first + j);
    is_finite = is_finite && tokens[j] >= 0;
  }
  if (params.head_reads_every_row)
    *choice = verify_greedy(params.pending + sequence * params.rows_per_sequence, params.num_draft_tokens,
                            [&](int64_t j) { return tokens[j]; });
  else
    *choice = {params.last_row, tokens[0]};
  return is_finite;
}

// Writes the new state of a sequence, once the whole step is known to have succeeded. One thread calls.
RECYCLE_DEVICE void commit(const SelectParams& params, int sequence) {
  const int64_t count = params.counts[sequence];
  const int first_row = sequence * params.rows_per_sequence;
  for (int j = 0; j < params.rows_per_sequence; ++j) {
    if (count > 0)
      params.pending[first_row + j] = params.buffers.new_pending[first_row + j];
    else
      params.tokens[first_row + j] = -1;
  }
  if (count <= 0) return;
  params.lengths[sequence] += count;
  if (params.num_draft_tokens > 0) params.module_lengths[sequence] += count;
}

// One block a sequence.
__global__ void __launch_bounds__(kThreads, 1) select_tokens_kernel(SelectParams params) {
  launch_dependents();
  grid_dependency_wait();
  const int sequence = blockIdx.x;
  const SelectBuffers& buffers = params.buffers;
  const int first_row = sequence * params.rows_per_sequence;
  const int64_t* pending = params.pending + first_row;
  int64_t* tokens = params.tokens + first_row;
  const int length = buffers.positions[first_row];
  const int module_length = params.num_draft_tokens > 0 ? static_cast<int>(params.module_lengths[sequence]) : 0;
  Choice choice = {0, 0};
  const bool is_used = length >= 0 && choose(params, sequence, length, &choice);
  const auto is_confirmed = [&](int j) { return is_used && j <= choice.accepted; };
  __syncthreads();  // all threads have read `positions`
  if (threadIdx.x == 0) {
    if (is_used) {
      for (int j = 0; j < choice.accepted; ++j) tokens[j] = pending[j + 1];
      tokens[choice.accepted] = choice.token;
      buffers.new_pending[first_row] = choice.token;
      params.counts[sequence] = choice.accepted + 1;
    } else if (length >= 0) {
      params.counts[sequence] = kNotFinite;
    }
    for (int j = 0; j < params.rows_per_sequence; ++j)
      buffers.positions[first_row + j] = is_confirmed(j) ? module_length + j : -1;
    if (params.num_draft_tokens > 0)
      buffers.draft_rows[sequence] = first_row + (is_used ? static_cast<int>(choice.accepted) : 0);
    else
      commit(params, sequence);
  }
  if (params.num_draft_tokens == 0) return;
  __syncthreads();
  for (int j = 0; j < params.rows_per_sequence; ++j) {
    float* input = buffers.module_input + (first_row + j) * 2 * params.hidden;
    if (is_confirmed(j))
      write_module_input(params, tokens[j], module_length + j, buffers.x + (first_row + j) * params.hidden,
                         params.final_norm, input);
    else
      clear_module_input(params, input);
  }
}

// The module's draft token, as a row of its head; -1 if a logit is nonfinite. length: of the base model's text, whose
// positions count for random numbers.
RECYCLE_DEVICE int64_t draft_token(const SelectParams& params, int sequence, int64_t length) {
  if (!params.is_sampled) return argmax(params.partial, sequence);
  if (params.buffers.module_finite[sequence] == 0) return -1;
  const int64_t n = params.draft_vocab_size;
  const float* probs = params.buffers.module_probs + (int64_t{params.draft} * params.batch + sequence) * n;
  return sample(probs, n, random(params, sequence, length, Stream::draft));
}

// The distributions that the new draft tokens were drawn from. All threads call.
RECYCLE_DEVICE void commit_probs(const SelectParams& params, int sequence) {
  const int64_t n = params.draft_vocab_size;
  for (int draft = 0; draft < params.num_draft_tokens; ++draft) {
    const float* from = params.buffers.module_probs + (int64_t{draft} * params.batch + sequence) * n;
    float* to = params.draft_probs + (int64_t{sequence} * params.num_draft_tokens + draft) * n;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = from[i];
  }
}

// One block a sequence.
__global__ void __launch_bounds__(kThreads, 1) select_draft_kernel(SelectParams params) {
  launch_dependents();
  grid_dependency_wait();
  const int sequence = blockIdx.x;
  const SelectBuffers& buffers = params.buffers;
  const bool is_last = params.draft + 1 == params.num_draft_tokens;
  // The module's row that the head read. After the first pass a sequence has one row.
  const int row = buffers.draft_rows[sequence];
  const int position = params.draft == 0 ? buffers.positions[row] : buffers.draft_positions[sequence];
  // Positions that the base model has read and the module has not.
  const int64_t skipped = params.lengths[sequence] - params.module_lengths[sequence];
  int64_t count = params.counts[sequence];
  int64_t token = 0;
  if (count > 0) {
    const int64_t index = draft_token(params, sequence, position + skipped + 2);
    if (index >= 0) token = draft_id(params, index);
    if (index < 0)
      count = kNotFinite;
    else if (!is_token(params, token))
      count = kBadToken;
  }
  const bool is_used = count > 0;
  __syncthreads();
  if (is_last && is_used && params.draft_probs != nullptr) commit_probs(params, sequence);
  if (!is_last) {
    float* input = buffers.module_input + sequence * 2 * params.hidden;
    if (is_used)
      write_module_input(params, token, position + 1, buffers.module_x + row * params.hidden, nullptr, input);
    else
      clear_module_input(params, input);
  }
  if (threadIdx.x != 0) return;
  params.counts[sequence] = count;
  buffers.new_pending[sequence * params.rows_per_sequence + params.draft + 1] = token;
  if (is_last) return commit(params, sequence);
  buffers.draft_positions[sequence] = is_used ? position + 1 : -1;
  buffers.draft_rows[sequence] = sequence;
}

}  // namespace

SelectParams select_params(const DecodeState& state, int prefill_sequence, const SelectBuffers& buffers,
                           int64_t* tokens, int64_t* counts) {
  const Base& base = state.model->base;
  const Module& module = state.model->module;
  const bool drafts = state.num_draft_tokens > 0;
  SelectParams params = {};
  params.buffers = buffers;
  params.pending = state.pending;
  params.lengths = state.lengths;
  params.module_lengths = state.module_lengths();
  params.tokens = tokens;
  params.counts = counts;
  params.embedding = base.embedding;
  params.final_norm = base.final_norm;
  params.base_eps = base.stack.eps;
  params.hidden = base.stack.hidden;
  params.vocab = base.head.n;
  params.capacity = state.base_cache.capacity;
  if (drafts && state.module_cache.capacity < params.capacity) params.capacity = state.module_cache.capacity;
  params.batch = static_cast<int>(state.batch);
  params.num_draft_tokens = static_cast<int>(state.num_draft_tokens);
  params.rows_per_sequence = static_cast<int>(state.rows_per_sequence());
  params.prefill_sequence = prefill_sequence;
  params.last_row = prefill_sequence < 0 ? params.num_draft_tokens : 0;
  params.head_reads_every_row = state.mode == Mode::verify && prefill_sequence < 0;
  params.is_sampled = !state.sampling.greedy();
  params.seeds = state.sampling.seeds;
  params.draft_probs = params.is_sampled ? state.draft_probs : nullptr;
  if (!drafts) return params;
  params.embed_norm = module.embed_norm;
  params.hidden_norm = module.hidden_norm;
  params.draft_vocab = module.draft_vocab;
  params.draft_vocab_size = module.head.n;
  params.module_eps = module.stack.eps;
  params.zero_first_embedding = module.zero_first_embedding;
  return params;
}

void begin_step(Launcher& launcher, const SelectParams& params) {
  launcher.run(begin_kernel, dim3(params.batch * params.rows_per_sequence), kThreads, 0, params);
}

void select_tokens(Launcher& launcher, SelectParams params, const PartialArgmax& partial) {
  params.partial = partial;
  launcher.run(select_tokens_kernel, dim3(params.batch), kThreads, kSampleSharedBytes, params);
}

void select_draft(Launcher& launcher, SelectParams params, const PartialArgmax& partial, int draft) {
  params.partial = partial;
  params.draft = draft;
  launcher.run(select_draft_kernel, dim3(params.batch), kThreads, kSampleSharedBytes, params);
}

}  // namespace recycle::cuda
