// The kernels between the passes (select.h): embeddings, the choice, drafts. A block a row or a sequence; bounded
// by the latency of a few dependent reads, some microseconds a step.
#include "select.h"

#include "recycle/choice.h"
#include "sampling.h"

namespace recycle::cuda {

namespace {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

using Draw = recycle::Stream;  // what a random number is for; a Stream is CUDA's here

// What kernels need of a SequenceCall, in the GPU's terms.
struct View {
  SequenceArrays arrays;
  int64_t* pending;
  int64_t* lengths;
  int64_t* module_lengths;
  int64_t* tokens;
  int64_t* counts;
  Matrix embedding;
  const float* final_norm;
  float base_eps;
  int64_t hidden, vocab, capacity;
  int width, drafts;
  int first_of;
  int last;  // of a sequence's base rows in use
  bool asks_every_row;
  bool sampled;
  const int64_t* seeds;
  // the module's
  const float *embed_norm, *hidden_norm;
  const int64_t* draft_vocab;
  int64_t n_draft_vocab;
  float* draft_probs;  // [batch, drafts, n_draft_vocab] sampled verify mode only
  float eps;
  bool zero_first_embedding;
};

View view_of(const SequenceCall& call) {
  const Model& model = *call.model;
  View view = {};
  view.arrays = call.arrays;
  view.pending = call.state.pending;
  view.lengths = call.state.lengths;
  view.module_lengths = call.state.module_lengths();
  view.tokens = call.tokens;
  view.counts = call.counts;
  view.embedding = model.base.embedding;
  view.final_norm = model.base.final_norm;
  view.base_eps = model.base.stack.eps;
  view.hidden = model.base.stack.hidden;
  view.vocab = model.base.head.n;
  view.capacity = call.capacity;
  view.drafts = static_cast<int>(call.state.drafts);
  view.width = view.drafts + 1;
  view.first_of = call.first_of;
  view.last = call.first_of < 0 ? view.drafts : 0;
  view.asks_every_row = call.state.mode == Mode::verify && call.first_of < 0;
  view.sampled = !call.state.sampling.greedy();
  view.seeds = call.state.sampling.seeds;
  view.draft_probs = call.state.draft_probs;
  if (call.state.drafts > 0) {
    view.embed_norm = model.module.embed_norm;
    view.hidden_norm = model.module.hidden_norm;
    view.draft_vocab = model.module.draft_vocab;
    view.n_draft_vocab = model.module.head.n;
    view.eps = model.module.stack.eps;
    view.zero_first_embedding = model.module.zero_first_embedding;
  }
  return view;
}

// Element k of row `row`: for looking up embeddings, a row at a time.
RECYCLE_DEVICE float weight_at(const Matrix& matrix, int64_t row, int64_t k) {
  const std::byte* panel = matrix.data + row / kPanelRows * panel_bytes(matrix.format, matrix.k);
  const int64_t lane = row % kPanelRows;
  const auto half = [](const std::byte* at) {
    return half_to_float(*reinterpret_cast<const uint16_t*>(at));
  };
  switch (matrix.format) {
    case Format::f32:
      return reinterpret_cast<const float*>(panel)[k * kPanelRows + lane];
    case Format::f16:
      return half(panel + (k * kPanelRows + lane) * 2);
    case Format::bf16:
      return bf16_to_float(
          reinterpret_cast<const uint16_t*>(panel)[(k / 2 * kPanelRows + lane) * 2 + k % 2]);
    default:
      break;
  }
  const int64_t block = k / kBlock, i = k % kBlock;
  const std::byte* scales = panel + scales_at(matrix.format, block) + lane * 2;
  const auto* quants =
      reinterpret_cast<const uint8_t*>(panel + quants_at(matrix.format, block)) + lane * 4;
  const float scale = half(scales);
  if (matrix.format == Format::q8_0)
    return scale * static_cast<float>(static_cast<int>(quants[i / 4 * kAlign + i % 4]) - 128);
  const uint8_t byte = quants[i / 8 * kAlign + i % 4];
  const auto nibble = static_cast<float>(i % 8 < 4 ? byte & 15 : byte >> 4);
  return matrix.format == Format::q4_0 ? scale * (nibble - 8)
                                       : scale * nibble + half(scales + kPanelRows * 2);
}

// to = from / sqrt(mean(from^2) + eps) * weight; as it is where weight is null. In place is fine. All threads.
RECYCLE_DEVICE void norm_row(const float* from, const float* weight, float eps, int64_t n,
                             float* to) {
  float* sums = shared_memory<float>();  // [warps]
  float scale = 1;
  if (weight != nullptr) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) sum = fmaf(from[i], from[i], sum);
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < kBlockWarps; ++w) sum += sums[w];
    scale = 1 / sqrtf(sum / static_cast<float>(n) + eps);
  }
  for (int64_t i = threadIdx.x; i < n; i += kBlockThreads)
    to[i] = weight != nullptr ? from[i] * scale * weight[i] : from[i];
}

static_assert(kDrawThreads == kBlockThreads);
static_assert(kMaxDrafts + 1 <= kBlockThreads);

// A block a row.
__global__ void __launch_bounds__(kBlockThreads) begin_kernel(View view) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x;
  const int sequence = row / view.width;
  const int64_t* pending = view.pending + sequence * view.width;
  const int64_t length = view.lengths[sequence];
  const bool idle = pending[0] < 0 || (view.first_of >= 0 && sequence != view.first_of);
  const int64_t needed = view.first_of < 0 ? positions_needed(view.drafts)
                         : view.drafts > 0 ? view.drafts
                                           : 1;
  bool fits = length >= 0 && length <= view.capacity - needed;
  if (view.drafts > 0) {
    const int64_t read = view.module_lengths[sequence];
    fits = fits && read >= 0 && read <= length;
  }
  for (int j = 0; j <= view.last; ++j) fits = fits && pending[j] >= 0 && pending[j] < view.vocab;
  const bool in_use = !idle && fits && row % view.width <= view.last;
  for (int64_t i = threadIdx.x; i < view.hidden; i += kBlockThreads)
    view.arrays.x[row * view.hidden + i] =
        in_use ? weight_at(view.embedding, pending[row % view.width], i) : 0;
  if (row == 0)
    for (int i = threadIdx.x; i < view.arrays.n_arrived; i += kBlockThreads)
      view.arrays.arrived[i] = 0;
  if (threadIdx.x != 0) return;
  view.arrays.positions[row] = in_use ? static_cast<int>(length) + row % view.width : -1;
  if (view.asks_every_row)
    view.arrays.head_rows[row] = row;
  else if (row < static_cast<int>(gridDim.x) / view.width)
    view.arrays.head_rows[row] = row * view.width + view.last;
  if (row % view.width == 0) {
    view.arrays.grown[sequence] = idle ? 0 : fits ? 1 : kNoRoom;
    for (int j = 0; j < view.width; ++j) {
      view.arrays.new_pending[sequence * view.width + j] = pending[j];
      view.tokens[sequence * view.width + j] = -1;
    }
  }
}

// One row of the module's inputs: the embedding of the token after it, and its hidden state.
RECYCLE_DEVICE void module_input(const View& view, int64_t token, int position, const float* state,
                                 const float* state_norm, float* pair) {
  const bool nothing = view.zero_first_embedding && position == 0;
  for (int64_t i = threadIdx.x; i < view.hidden; i += kBlockThreads)
    pair[i] = nothing ? 0 : weight_at(view.embedding, token, i);
  norm_row(pair, view.embed_norm, view.eps, view.hidden, pair);
  norm_row(state, state_norm, view.base_eps, view.hidden, pair + view.hidden);
  if (view.hidden_norm != nullptr)
    norm_row(pair + view.hidden, view.hidden_norm, view.eps, view.hidden, pair + view.hidden);
}

// The new state of a sequence, once all of the step is known to have worked, by one thread.
RECYCLE_DEVICE void commit(const View& view, int sequence) {
  const int64_t grown = view.arrays.grown[sequence];
  view.counts[sequence] = grown;
  if (grown <= 0) {
    for (int j = 0; j < view.width; ++j) view.tokens[sequence * view.width + j] = -1;
    return;
  }
  for (int j = 0; j < view.width; ++j)
    view.pending[sequence * view.width + j] = view.arrays.new_pending[sequence * view.width + j];
  view.lengths[sequence] += grown;
  if (view.drafts > 0) view.module_lengths[sequence] += grown;
}

// ---- what counts --------------------------------------------------------------------------------------

RECYCLE_DEVICE float random(const View& view, int sequence, int64_t position, Draw stream) {
  return uniform(static_cast<uint64_t>(view.seeds[sequence]), static_cast<uint64_t>(position),
                 stream);
}

// `token` is in the draft vocabulary: it was drawn from it.
RECYCLE_DEVICE int64_t draft_index(const View& view, int64_t token) {
  if (view.draft_vocab == nullptr) return token;
  int64_t low = 0, high = view.n_draft_vocab;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (view.draft_vocab[middle] < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Speculative sampling (Leviathan et al. 2023, algorithm 1): a draft drawn from q counts with probability
// min(1, p / q); else the token is drawn from max(0, p - q).
RECYCLE_DEVICE Choice verify_sampled(const View& view, int sequence, int length) {
  const int64_t* pending = view.pending + sequence * view.width;
  float* probs = view.arrays.base_probs + int64_t{sequence} * view.width * view.vocab;
  for (int j = 0; j < view.drafts; ++j, probs += view.vocab) {
    const int64_t token = pending[j + 1];
    const int64_t position = length + j + 1;
    const float* q = view.draft_probs + (int64_t{sequence} * view.drafts + j) * view.n_draft_vocab;
    if (random(view, sequence, position, Draw::accept) * q[draft_index(view, token)] < probs[token])
      continue;
    __syncthreads();  // all have read probs[token]
    for (int64_t i = threadIdx.x; i < view.n_draft_vocab; i += kBlockThreads) {
      float& p = probs[view.draft_vocab != nullptr ? view.draft_vocab[i] : i];
      p = fmaxf(p - q[i], 0.0f);
    }
    __syncthreads();
    return {j, draw(probs, view.vocab, random(view, sequence, position, Draw::resample))};
  }
  return {view.drafts,
          draw(probs, view.vocab, random(view, sequence, length + view.width, Draw::sample))};
}

// False where a logit wasn't finite.
RECYCLE_DEVICE bool choose_tokens(const View& view, const HeadBests& bests, int sequence,
                                  int length, Choice* choice) {
  const int asked = view.asks_every_row ? view.width : 1;
  const int first = sequence * asked;  // the sequence's rows of the head
  if (view.sampled) {
    for (int j = 0; j < asked; ++j)
      if (view.arrays.base_finite[first + j] == 0) return false;
    if (view.asks_every_row)
      *choice = verify_sampled(view, sequence, length);
    else
      *choice = {view.last, draw(view.arrays.base_probs + first * view.vocab, view.vocab,
                                 random(view, sequence, length + view.last + 1, Draw::sample))};
    return true;
  }
  int picks[kMaxDrafts + 1];
  bool finite = true;
  for (int j = 0; j < asked; ++j) {
    picks[j] = pick(bests, first + j);
    finite = finite && picks[j] >= 0;
  }
  if (view.asks_every_row)
    *choice = verify_greedily(view.pending + sequence * view.width, view.drafts,
                              [&](int64_t j) { return picks[j]; });
  else
    *choice = {view.last, picks[0]};
  return finite;
}

// A block a sequence.
__global__ void __launch_bounds__(kBlockThreads) choose_kernel(View view, HeadBests bests) {
  let_next_start();
  wait_for_previous();
  const int sequence = blockIdx.x;
  const SequenceArrays& arrays = view.arrays;
  const int64_t* pending = view.pending + sequence * view.width;
  const int first_row = sequence * view.width;
  const int length = arrays.positions[first_row];
  const int read = view.drafts > 0 ? static_cast<int>(view.module_lengths[sequence]) : 0;
  bool in_use = length >= 0;
  Choice choice = {0, 0};
  if (in_use) in_use = choose_tokens(view, bests, sequence, length, &choice);
  const int64_t* confirmed = view.tokens + first_row;  // the tokens after each confirmed row
  __syncthreads();
  if (threadIdx.x == 0) {
    if (in_use) {
      int64_t* tokens = view.tokens + first_row;
      for (int j = 0; j < choice.accepted; ++j) tokens[j] = pending[j + 1];
      tokens[choice.accepted] = choice.token;
      arrays.new_pending[first_row] = choice.token;
      arrays.grown[sequence] = choice.accepted + 1;
    } else if (length >= 0) {
      arrays.grown[sequence] = kNonFinite;
    }
    for (int j = 0; j < view.width; ++j)
      arrays.positions[first_row + j] = in_use && j <= choice.accepted ? read + j : -1;
    if (view.drafts > 0)
      arrays.draft_rows[sequence] = first_row + (in_use ? static_cast<int>(choice.accepted) : 0);
    else
      commit(view, sequence);
  }
  if (view.drafts == 0) return;
  __syncthreads();
  for (int j = 0; j < view.width; ++j) {
    float* pair = arrays.pair + (first_row + j) * 2 * view.hidden;
    if (in_use && j <= choice.accepted) {
      module_input(view, confirmed[j], read + j, arrays.x + (first_row + j) * view.hidden,
                   view.final_norm, pair);
    } else {
      for (int64_t i = threadIdx.x; i < 2 * view.hidden; i += kBlockThreads) pair[i] = 0;
    }
  }
}

// A block a sequence.
__global__ void __launch_bounds__(kBlockThreads)
    draft_kernel(View view, HeadBests bests, int draft) {
  let_next_start();
  wait_for_previous();
  const int sequence = blockIdx.x;
  const SequenceArrays& arrays = view.arrays;
  const bool is_last = draft + 1 == view.drafts;
  // Of the row that the draft came from; after the first pass rows are the sequences'.
  const int from = arrays.draft_rows[sequence];
  const int position = draft == 0 ? arrays.positions[from] : arrays.draft_positions[sequence];
  // Draws go by the text's positions, which are the base's.
  const int64_t skipped = view.lengths[sequence] - view.module_lengths[sequence];
  bool in_use = arrays.grown[sequence] > 0;
  int64_t token = 0;
  if (in_use) {
    int64_t picked = -1;
    if (!view.sampled) {
      picked = pick(bests, sequence);
    } else if (arrays.module_finite[sequence] != 0) {
      const float* probs = arrays.module_probs + sequence * view.n_draft_vocab;
      picked = draw(probs, view.n_draft_vocab,
                    random(view, sequence, position + skipped + 2, Draw::draft));
      if (view.draft_probs != nullptr) {
        float* kept =
            view.draft_probs + (int64_t{sequence} * view.drafts + draft) * view.n_draft_vocab;
        for (int64_t i = threadIdx.x; i < view.n_draft_vocab; i += kBlockThreads)
          kept[i] = probs[i];
      }
    }
    in_use = picked >= 0;
    if (in_use) token = view.draft_vocab != nullptr ? view.draft_vocab[picked] : picked;
  }
  __syncthreads();
  if (!is_last) {
    float* pair = arrays.pair + sequence * 2 * view.hidden;
    if (in_use) {
      module_input(view, token, position + 1, arrays.module_x + from * view.hidden, nullptr, pair);
    } else {
      for (int64_t i = threadIdx.x; i < 2 * view.hidden; i += kBlockThreads) pair[i] = 0;
    }
  }
  if (threadIdx.x != 0) return;
  if (!in_use && arrays.grown[sequence] > 0) arrays.grown[sequence] = kNonFinite;
  arrays.new_pending[sequence * view.width + draft + 1] = token;
  if (is_last) return commit(view, sequence);
  arrays.draft_positions[sequence] = in_use ? position + 1 : -1;
  arrays.draft_rows[sequence] = sequence;
}

}  // namespace

void begin_step(Launcher& launcher, const SequenceCall& call) {
  const View view = view_of(call);
  launcher.run(begin_kernel, dim3(static_cast<unsigned>(call.state.batch * view.width)),
               kBlockThreads, 0, view);
}

void choose(Launcher& launcher, const SequenceCall& call, const HeadBests& bests) {
  launcher.run(choose_kernel, dim3(static_cast<unsigned>(call.state.batch)), kBlockThreads,
               kDrawBytes, view_of(call), bests);
}

void take_draft(Launcher& launcher, const SequenceCall& call, const HeadBests& bests, int draft) {
  launcher.run(draft_kernel, dim3(static_cast<unsigned>(call.state.batch)), kBlockThreads,
               kDrawBytes, view_of(call), bests, draft);
}

}  // namespace recycle::cuda
