// RMSNorm, output matrix and pick.
//
//   x [rows, hidden], head [n_vocab, hidden] packed  ->  token and log-probability of each row
//
// Bounded by reading the head, which for a small model is a fifth of all weights. Greedy: each tile of 64
// logits goes into a running maximum (and a partial sum of exponentials when log-probabilities are
// asked for) while it is in the L1 cache, and is forgotten. The partial sums belong to fixed tiles and are
// added up in the order of the vocabulary, so that threads don't change the result.
// Sampled: top-k and top-p, and the residual of speculative sampling, need the distribution; its logits
// go to scratch, which for 49,152 of them stays in the L2 cache.
#include "lm_head.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "recycle/random.h"
#include "sampling.h"

namespace recycle {

namespace {

int64_t n_tiles(int64_t n) {
  return (n + kTileRows - 1) / kTileRows;
}

}  // namespace

void HeadWork::take(Arena& arena, int64_t rows, int64_t n, bool greedy, bool log_probs,
                    int n_threads) {
  max_rows = rows;
  max_n = n;
  best = arena.take<ArgMax>(greedy ? n_threads * rows : 0);
  tile_sums = arena.take<float>(greedy && log_probs ? rows * n_tiles(n) * 2 : 0);
  logits = arena.take<float>(greedy ? 0 : rows * n);
  probs = arena.take<float>(greedy ? 0 : rows * n);
  order = arena.take<int32_t>(greedy ? 0 : n_threads * n);
}

void scan_head(const Team& team, const Matrix& head, const float* x, int64_t rows, bool greedy,
               bool log_probs, const ThreadWork& own, const std::byte* then, HeadWork& work) {
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
  product_tiles(head, {tiles.begin * kTilePanels, end < panels ? end : panels},
                own.activations(x, rows, head.k, {head.format}), rows, own, then,
                [&](int64_t row, int64_t first, int64_t padded, const float* values) {
                  const int64_t count = head.n - first < padded ? head.n - first : padded;
                  if (!greedy) {
                    std::memcpy(work.logits + row * work.max_n + first, values,
                                count * sizeof(float));
                    return;
                  }
                  isa.argmax(values, count, first, &best[row]);
                  if (!log_probs) return;
                  float* sums = work.tile_sums + (row * n_tiles(head.n) + first / kTileRows) * 2;
                  sums[0] = isa.max_value(values, count);
                  sums[1] = isa.exp_sum(values, count, sums[0], 1, nullptr);
                });
}

const std::byte* first_weights(const Team& team, const Matrix& head) {
  return head.panel(team.share(n_tiles(head.n)).begin * kTilePanels);
}

namespace {

// The largest of the threads' bests; its value goes to *value.
int64_t best_of(const HeadWork& work, int n_threads, int64_t row, float* value) {
  *value = -std::numeric_limits<float>::infinity();
  int64_t id = 0;
  for (int t = 0; t < n_threads; ++t) {
    const ArgMax& best = work.best[t * work.max_rows + row];
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      if (!(best.poison[lane] == 0)) return -1;
      if (best.value[lane] > *value || (best.value[lane] == *value && best.id[lane] < id)) {
        *value = best.value[lane];
        id = best.id[lane];
      }
    }
  }
  return id;
}

}  // namespace

int64_t greedy_pick(const HeadWork& work, int n_threads, int64_t row) {
  float value;
  return best_of(work, n_threads, row, &value);
}

namespace {

struct Call {
  const HeadParams& params;
  HeadWork work;
  ThreadWork threads[kMaxThreads];
};

void take(Arena& arena, int64_t n_rows, int64_t hidden, int64_t n_vocab, bool greedy, int n_threads,
          HeadWork& work, ThreadWork* threads) {
  work.take(arena, n_rows, n_vocab, greedy, true, n_threads);
  for (int t = 0; t < n_threads; ++t) {
    threads[t].take(arena, n_rows, hidden);
  }
}

float log_prob_greedy(const HeadWork& work, int64_t row, int64_t tiles, float logit) {
  const float* sums = work.tile_sums + row * tiles * 2;
  float maximum = sums[0];
  for (int64_t t = 1; t < tiles; ++t) maximum = std::fmax(maximum, sums[t * 2]);
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t)
    total += sums[t * 2 + 1] * std::exp(static_cast<double>(sums[t * 2]) - maximum);
  return static_cast<float>(logit - maximum - std::log(total));
}

void run(const Team& team, void* context) {
  Call& call = *static_cast<Call*>(context);
  const HeadParams& params = call.params;
  const ThreadWork& own = call.threads[team.thread];
  const bool greedy = params.sampling.greedy();
  const float* x = params.x;
  if (params.norm != nullptr) {
    for (int64_t row = 0; row < params.n_rows; ++row)
      kernels().rms_norm(params.x + row * params.hidden, params.norm, params.eps, params.hidden,
                         own.input + row * params.hidden);
    x = own.input;
  }
  scan_head(team, params.head, x, params.n_rows, greedy, true, own,
            first_weights(team, params.head), call.work);
  team.barrier(Phase::head);

  const int64_t n = params.head.n;
  const Range rows = team.share(params.n_rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (greedy) {
      float logit;
      params.tokens[row] = best_of(call.work, team.n_threads, row, &logit);
      if (params.tokens[row] >= 0)
        params.log_probs[row] = log_prob_greedy(call.work, row, n_tiles(n), logit);
      continue;
    }
    float* logits = call.work.logits + row * n;
    const float maximum = kernels().max_value(logits, n);
    const double normaliser =
        maximum + std::log(static_cast<double>(kernels().exp_sum(logits, n, maximum, 1, nullptr)));
    const Sampling& sampling = params.sampling;
    float* probs = call.work.probs + row * n;
    if (!to_distribution(sampling, logits, n, probs, call.work.order + team.thread * n)) {
      params.tokens[row] = -1;
      continue;
    }
    const float u = uniform(static_cast<uint64_t>(sampling.seeds[row]),
                            static_cast<uint64_t>(params.positions[row]), Stream::sample);
    params.tokens[row] = draw(probs, n, u);
    params.log_probs[row] = static_cast<float>(logits[params.tokens[row]] - normaliser);
  }
}

}  // namespace

int64_t head_scratch_bytes(int64_t n_rows, int64_t hidden, int64_t n_vocab, bool greedy,
                           int n_threads) {
  Arena arena(nullptr);
  HeadWork work;
  ThreadWork threads[kMaxThreads];
  take(arena, n_rows, hidden, n_vocab, greedy, n_threads, work, threads);
  return arena.used();
}

Status recycle_head(const HeadParams& params) {
  Call call{params, {}, {}};
  Arena arena(params.scratch);
  take(arena, params.n_rows, params.hidden, params.head.n, params.sampling.greedy(), n_threads(),
       call.work, call.threads);
  parallel(run, &call);
  for (int64_t row = 0; row < params.n_rows; ++row)
    if (params.tokens[row] < 0)
      return {StatusCode::nonfinite, row,
              params.positions != nullptr ? params.positions[row] : int64_t{-1}};
  return {};
}

}  // namespace recycle
