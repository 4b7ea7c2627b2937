// Which draft tokens verify mode accepts: the greedy rule and that of speculative sampling, for CPU and GPU.
#pragma once

#include <cstdint>

namespace recycle {

// A step's result for one sequence: the first `accepted` draft tokens, then `token`, the base model's own.
struct Choice {
  int64_t accepted;
  int64_t token;
};

// Greedy verify: a draft token is accepted if it is the base model's argmax after the token before it.
// pending: [1 + num_draft_tokens], a certain token and the draft tokens; argmax(j): the base model's token
// after pending[j].
template <class Argmax>
constexpr Choice verify_greedy(const int64_t* pending, int64_t num_draft_tokens, Argmax argmax) {
  int64_t accepted = 0;
  while (accepted < num_draft_tokens && argmax(accepted) == pending[accepted + 1]) ++accepted;
  return {accepted, argmax(accepted)};
}

// Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1): a draft token with
// probability q where it was drawn and p in the base model counts with probability min(1, p / q).
// u: uniform in [0, 1).
constexpr bool accepts_draft(float u, float p, float q) { return u * q < p; }

// A rejected draft token is replaced by a draw from max(0, p - q), renormalized.
constexpr float residual(float p, float q) { return p - q < 0.0f ? 0.0f : p - q; }

}  // namespace recycle
