// decode_step: the base model over the pending tokens, the choice, and the module's new drafts: one
// call, one parallel region. prefill: the same over a prompt.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/head.h"
#include "recycle/kv_cache.h"
#include "recycle/model.h"
#include "recycle/status.h"

namespace recycle {

enum class Mode : int64_t { standard = 0, verify = 1, alternate = 2 };

inline constexpr int64_t kMaxDrafts = 4;
// Rows of a prompt that pass through the layers together.
inline constexpr int64_t kPrefillRows = 64;

// Free positions the caches must have for a step: the base writes k + 1 rows, the module the rows then
// confirmed (k + 1 at most) and k - 1 of its own.
constexpr int64_t positions_needed(int64_t drafts) {
  return drafts > 0 ? 2 * drafts : 1;
}

// The module may have read less than the base: standard steps leave it out. It then reads on as if the text in
// between weren't there, in rows that follow each other, so its lengths are its own; they stand still in
// standard mode.
struct DecodeState {
  const Model* model = nullptr;
  int64_t batch = 0;
  int64_t drafts = 0;  // k; 0 in standard mode
  Mode mode = Mode::standard;
  Sampling sampling;  // seeds: [batch]
  KvCache base_cache;
  KvCache module_cache;          // unused in standard mode
  int64_t* pending = nullptr;    // [batch, drafts + 1]; pending[b][0] < 0: the sequence is idle
  int64_t* lengths = nullptr;    // [2, batch] positions in the base's cache, then in the module's
  float* draft_probs = nullptr;  // [batch, drafts, draft vocabulary]; sampled verify mode only
  std::byte* scratch = nullptr;  // decode_scratch_bytes()

  int64_t* module_lengths() const { return lengths + batch; }
};

// Scratch for both calls below, with the present number of threads.
int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t drafts, bool greedy,
                             int n_threads);

// tokens [batch, drafts + 1]: the accepted drafts and one token of the base model's own, then -1;
// counts [batch]: how many. On an error the state (pending, lengths) is as it was.
Status decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts);

// Fills the caches of `sequence` with prompt [n_prompt] from position 0, and its pending tokens.
Status prefill(const DecodeState& state, int64_t sequence, const int64_t* prompt, int64_t n_prompt);

}  // namespace recycle
