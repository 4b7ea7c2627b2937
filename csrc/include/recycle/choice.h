// What a step makes of the base's picks (greedy): the accepted drafts and one token of the base's own.
#pragma once

#include <cstdint>

namespace recycle {

struct Choice {
  int64_t accepted;  // drafts
  int64_t token;     // the base's own, after them
};

// pending: t_0, t_1 .. t_drafts. pick(j): the base's pick after t_j; a draft counts if it is the pick before it.
template <class Pick>
constexpr Choice verify_greedily(const int64_t* pending, int64_t drafts, Pick pick) {
  int64_t accepted = 0;
  while (accepted < drafts && pick(accepted) == pending[accepted + 1]) ++accepted;
  return {accepted, pick(accepted)};
}

}  // namespace recycle
