// The output matrix over a few rows: the best token of each without its logits reaching memory, or the
// logits themselves where sampling needs the whole distribution.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "recycle/arena.h"
#include "recycle/head.h"
#include "recycle/parallel.h"
#include "transformer.h"

namespace recycle {

struct HeadWork {
  ArgMax* best;      // [threads, rows]                      greedy
  float* tile_sums;  // [rows, tiles, 2] maximum, sum of exp  greedy with log-probabilities
  float* logits;     // [rows, n]                             sampled
  float* probs;      // [rows, n]                             sampled
  int32_t* order;    // [threads, n]                          sampled
  int64_t max_rows, max_n;

  void take(Arena& arena, int64_t rows, int64_t n, bool greedy, bool log_probs, int n_threads);
};

// x [rows, head.k], already normalised. Fills work.best (greedy), work.tile_sums (if `log_probs`) or
// work.logits. A barrier must follow. then: what this thread reads next.
void scan_head(const Team& team, const Matrix& head, const float* x, int64_t rows, bool greedy,
               bool log_probs, const ThreadWork& own, const std::byte* then, HeadWork& work);

// What this thread reads first in scan_head().
const std::byte* first_weights(const Team& team, const Matrix& head);

// The best row of the head for `row`: the largest logit, the lowest index among equals; -1 if a logit was
// NaN or infinite. Any one thread, after the barrier.
int64_t greedy_pick(const HeadWork& work, int n_threads, int64_t row);

}  // namespace recycle
