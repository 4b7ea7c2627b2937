// recycle_head: RMSNorm, output matrix, softmax and the next token in one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"
#include "recycle/status.h"

namespace recycle {

// How a token is chosen from logits: divide by the temperature, keep the top_k largest, of those the
// smallest set whose probability reaches top_p, renormalize, draw. temperature 0 is greedy: the argmax, the
// lowest id among equals. Other temperatures are in [2^-126, 2^126], so that their inverse is a normal number.
struct Sampling {
  float temperature = 0;
  int64_t top_k = 0;               // 0: all
  float top_p = 1;                 // 1: all
  const int64_t* seeds = nullptr;  // one of each sequence

  constexpr bool greedy() const { return temperature == 0; }
};

inline constexpr int64_t kMaxHeadRows = 64;

struct HeadParams {
  int64_t n_rows = 0;
  int64_t hidden = 0;
  const float* x = nullptr;     // [n_rows, hidden]
  const float* norm = nullptr;  // [hidden] or null: x is used as it is
  float eps = 0;
  Matrix head;                         // [n_vocab, hidden]
  Sampling sampling;                   // seeds: [n_rows]
  const int64_t* positions = nullptr;  // [n_rows], the counter of the random draw
  int64_t* tokens = nullptr;           // [n_rows]
  float* log_probs = nullptr;          // [n_rows] log softmax(logits)[token], before temperature and cuts
  std::byte* scratch = nullptr;        // head_scratch_bytes()
  int n_threads = 1;                   // CPU only
};

int64_t head_scratch_bytes(int64_t n_rows, int64_t hidden, int64_t n_vocab, bool greedy, int n_threads);
Status recycle_head(const HeadParams& params);

}  // namespace recycle
