// From logits to probabilities to a token.
#pragma once

#include <cstdint>

#include "recycle/head.h"

namespace recycle {

// Turns logits [n] into probabilities [n]: temperature, top_k, top_p, renormalised. order: [n], work
// space. False if a logit is NaN or infinite.
bool to_distribution(const Sampling& sampling, const float* logits, int64_t n, float* probs,
                     int32_t* order);

// The token at `u` in [0, 1) of the cumulative distribution.
int64_t draw(const float* probs, int64_t n, float u);

}  // namespace recycle
