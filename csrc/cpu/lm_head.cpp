// RMSNorm, output matrix and the next token.
//
//   x [rows, hidden], head [n_vocab, hidden] packed  ->  token and log-probability of each row
//
// Bounded by reading the head, a fifth of a small model's weights. Greedy: each tile of 64 logits updates a running
// argmax (and a partial sum of exponentials, for log-probabilities) while the tile is in the L1 cache, and is then
// dropped. Partial sums belong to fixed tiles and are added in the order of the vocabulary, so the number of threads
// does not change the result.
// Sampled: top-k, top-p and the residual of speculative sampling need the whole distribution. The logits go to
// scratch, and 49,152 of them stay in the L2 cache.
#include "lm_head.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "recycle/random.h"
#include "sampling.h"

namespace recycle {

namespace {

int64_t n_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

// Writes this thread's share of the logits, or of what greedy decoding keeps of them.
void run_tiles(const Team& team, const Matrix& head, const float* x, int64_t rows, bool greedy,
               const ThreadScratch& scratch, const std::byte* next, HeadWork& work) {
  const Kernels& isa = kernels();
  ArgMax* best = work.best + team.thread * work.max_rows;
  if (greedy) {
    for (int64_t row = 0; row < rows; ++row) {
      best[row] = {};
      for (float& value : best[row].value) value = -std::numeric_limits<float>::infinity();
    }
  }
  const Range tiles = team.share(n_tiles(head.n));
  const int64_t panels = n_panels(head.n);
  const int64_t end = tiles.end * kTilePanels;
  linear(head, {tiles.begin * kTilePanels, end < panels ? end : panels},
         scratch.activations(x, rows, head.k, {head.format}), rows, scratch, next,
         [&](int64_t row, int64_t first, int64_t padded, const float* values) {
           const int64_t count = head.n - first < padded ? head.n - first : padded;
           if (!greedy) {
             std::memcpy(work.logits_of(row) + first, values, count * sizeof(float));
             return;
           }
           isa.argmax(values, count, first, &best[row]);
           if (!work.log_probs) return;
           float* sums = work.tile_sums + (row * n_tiles(head.n) + first / kTileRows) * 2;
           sums[0] = isa.max_value(values, count);
           sums[1] = isa.exp_sum(values, count, sums[0], 1, nullptr);
         });
}

// Combines the threads' argmax: the lowest id among equals; -1 if a logit was nonfinite.
int64_t combine_argmax(const HeadWork& work, int n_threads, int64_t row) {
  float value = -std::numeric_limits<float>::infinity();
  int64_t id = 0;
  for (int t = 0; t < n_threads; ++t) {
    const ArgMax& best = work.best[t * work.max_rows + row];
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      if (!(best.nonfinite[lane] == 0)) return -1;
      if (best.value[lane] > value || (best.value[lane] == value && best.id[lane] < id)) {
        value = best.value[lane];
        id = best.id[lane];
      }
    }
  }
  return id;
}

}  // namespace

void HeadWork::take(Arena& arena, int64_t rows, int64_t n, bool greedy, bool with_log_probs, int n_threads) {
  max_rows = rows;
  max_n = n;
  log_probs = with_log_probs;
  best = arena.take<ArgMax>(greedy ? n_threads * rows : 0);
  tile_sums = arena.take<float>(greedy && log_probs ? rows * n_tiles(n) * 2 : 0);
  logits = arena.take<float>(greedy ? 0 : rows * n);
  probs = arena.take<float>(greedy ? 0 : rows * n);
  order = arena.take<int32_t>(greedy ? 0 : n_threads * n);
  tokens = arena.take<int64_t>(rows);
}

void run_head(const Team& team, const Matrix& head, const HeadInput& input, const Sampling& sampling,
              const ThreadScratch& scratch, const std::byte* next, HeadWork& work) {
  for (int64_t row = 0; row < input.n_rows; ++row) {
    const float* x = input.x + (input.source != nullptr ? input.source[row] : row) * head.k;
    float* to = scratch.input + row * head.k;
    if (input.norm != nullptr)
      kernels().rms_norm(x, input.norm, input.eps, head.k, to);
    else
      std::memcpy(to, x, head.k * sizeof(float));
  }
  run_tiles(team, head, scratch.input, input.n_rows, sampling.greedy(), scratch, next, work);
  team.barrier(Phase::head);
  const Range share = team.share(input.n_rows);
  for (int64_t row = share.begin; row < share.end; ++row) {
    if (sampling.greedy()) {
      work.tokens[row] = combine_argmax(work, team.n_threads, row);
    } else {
      const bool finite = to_distribution(sampling, work.logits_of(row), head.n, work.probs_of(row),
                                          work.order + team.thread * work.max_n);
      work.tokens[row] = finite ? 0 : -1;
    }
  }
}

const std::byte* first_weights(const Team& team, const Matrix& head) {
  return head.panel(team.share(n_tiles(head.n)).begin * kTilePanels);
}

namespace {

struct RecycleHeadWork {
  HeadWork head;
  ThreadScratch threads[kMaxThreads];

  void take(Arena& arena, int64_t n_rows, int64_t hidden, int64_t n_vocab, bool greedy, int n_threads) {
    head.take(arena, n_rows, n_vocab, greedy, true, n_threads);
    for (int t = 0; t < n_threads; ++t) threads[t].take(arena, n_rows, hidden);
  }
};

// The log-probability of the argmax, from the sums of the tiles: the argmax's logit is the maximum.
float greedy_log_prob(const HeadWork& work, int64_t row) {
  const int64_t tiles = n_tiles(work.max_n);
  const float* sums = work.tile_sums + row * tiles * 2;
  float maximum = sums[0];
  for (int64_t t = 1; t < tiles; ++t) maximum = std::fmax(maximum, sums[t * 2]);
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += sums[t * 2 + 1] * std::exp(static_cast<double>(sums[t * 2]) - maximum);
  return static_cast<float>(0 - std::log(total));
}

void write_result(const HeadParams& params, const HeadWork& work, int64_t row) {
  params.tokens[row] = work.tokens[row];
  if (work.tokens[row] < 0) return;
  if (params.sampling.greedy()) {
    params.log_probs[row] = greedy_log_prob(work, row);
    return;
  }
  const int64_t n = params.head.n;
  const float* logits = work.logits_of(row);
  const float maximum = kernels().max_value(logits, n);
  const double log_total = maximum + std::log(static_cast<double>(kernels().exp_sum(logits, n, maximum, 1, nullptr)));
  const float u = uniform(static_cast<uint64_t>(params.sampling.seeds[row]),
                          static_cast<uint64_t>(params.positions[row]), Stream::sample);
  params.tokens[row] = draw(work.probs_of(row), n, u);
  params.log_probs[row] = static_cast<float>(logits[params.tokens[row]] - log_total);
}

}  // namespace

int64_t head_scratch_bytes(int64_t n_rows, int64_t hidden, int64_t n_vocab, bool greedy, int n_threads) {
  Arena arena(nullptr);
  RecycleHeadWork work;
  work.take(arena, n_rows, hidden, n_vocab, greedy, n_threads);
  return arena.used();
}

Status recycle_head(const HeadParams& params) {
  RecycleHeadWork work;
  Arena arena(params.scratch);
  work.take(arena, params.n_rows, params.hidden, params.head.n, params.sampling.greedy(), params.n_threads);
  parallel(params.n_threads, [&](const Team& team) {
    run_head(team, params.head, {params.x, params.n_rows, nullptr, params.norm, params.eps}, params.sampling,
             work.threads[team.thread], first_weights(team, params.head), work.head);
    const Range share = team.share(params.n_rows);
    for (int64_t row = share.begin; row < share.end; ++row) write_result(params, work.head, row);
  });
  for (int64_t row = 0; row < params.n_rows; ++row)
    if (params.tokens[row] < 0) return {StatusCode::nonfinite, row, params.positions[row]};
  return {};
}

}  // namespace recycle
