// The output matrix (head) over a few rows: the argmax of each without its logits reaching memory, or, for sampling,
// the whole distribution.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "recycle/arena.h"
#include "recycle/head.h"
#include "recycle/parallel.h"
#include "transformer.h"

namespace recycle {

struct HeadWork {
  ArgMax* best;      // [threads, rows]                        greedy
  float* tile_sums;  // [rows, tiles, 2] maximum, sum of exp   greedy with log-probabilities
  float* logits;     // [rows, n]                              sampled
  float* probs;      // [rows, n]                              sampled
  int32_t* order;    // [threads, n]                           sampled
  int64_t* tokens;   // [rows] greedy: the argmax; sampled: 0; a nonfinite logit: -1
  int64_t max_rows, max_n;
  bool log_probs;

  void take(Arena& arena, int64_t rows, int64_t n, bool greedy, bool log_probs, int n_threads);
  float* logits_of(int64_t row) const { return logits + row * max_n; }
  float* probs_of(int64_t row) const { return probs + row * max_n; }
};

// The rows of a head: x[source[0]], x[source[1]], ...; without `source` x[0], x[1], ...
struct HeadInput {
  const float* x;  // [any, hidden]
  int64_t n_rows;
  const int64_t* source = nullptr;
  const float* norm = nullptr;  // null: x is used as it is
  float eps = 0;
};

// Fills work.tokens; if sampled, work.logits and work.probs; if greedy with log-probabilities, work.tile_sums. All
// threads call it. A thread sees the results of its share of the rows, and after a barrier those of the others.
// next: what this thread reads next.
void run_head(const Team& team, const Matrix& head, const HeadInput& input, const Sampling& sampling,
              const ThreadScratch& scratch, const std::byte* next, HeadWork& work);

// What this thread reads first in run_head().
const std::byte* first_weights(const Team& team, const Matrix& head);

}  // namespace recycle
