// decode_step: the base model over the pending tokens, the choice of accepted draft tokens, and the module's new draft
// tokens, in one call. prefill: the same over a prompt.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/head.h"
#include "recycle/kv_cache.h"
#include "recycle/model.h"
#include "recycle/status.h"

namespace recycle {

// standard: no draft tokens. verify: a draft token is accepted if the base model agrees (choice.h).
// alternate: every draft token is accepted.
enum class Mode : int64_t { standard = 0, verify = 1, alternate = 2 };

// Draft tokens of one sequence in one step.
inline constexpr int64_t kMaxDraftTokens = 4;
// Rows of a prompt that pass through the layers together.
inline constexpr int64_t kPrefillRows = 64;

// Free positions the caches must have for a step with k draft tokens: the base model writes k + 1 rows; the
// module writes the confirmed rows (at most k + 1), then k - 1 rows of its own.
constexpr int64_t positions_needed(int64_t num_draft_tokens) { return num_draft_tokens > 0 ? 2 * num_draft_tokens : 1; }

// counts[b] of a step for a sequence that failed. Its pending tokens, lengths and draft_probs are as before the step,
// its row of tokens is all -1, and the other sequences are what they would be without it.
inline constexpr int64_t kNotFinite = -1;  // a logit was NaN or infinite
inline constexpr int64_t kNoRoom = -2;     // its caches lack positions_needed()
inline constexpr int64_t kBadToken = -3;  // a pending token is outside of the vocabulary; the CPU's op refuses the call

// The module may have read fewer positions than the base model, because standard steps leave the module out.
// The module then continues as if the tokens in between were absent: its rows follow each other, and its
// lengths are counted apart. Standard steps leave these lengths as they are.
struct DecodeState {
  const Model* model = nullptr;
  int64_t batch = 0;
  int64_t num_draft_tokens = 0;  // k: of each sequence; 0 in standard mode
  Mode mode = Mode::standard;
  Sampling sampling;  // seeds: [batch]
  KvCache base_cache;
  KvCache module_cache;  // unused in standard mode
  // [batch, k + 1]; pending[b][0] < 0: the sequence is idle. The draft tokens may come from anywhere.
  int64_t* pending = nullptr;
  int64_t* lengths = nullptr;  // [2, batch] positions in the cache: the base model's, the module's
  // [batch, k, draft vocabulary]: the distributions that the draft tokens were drawn from; sampled verify mode only. A
  // draft token outside of the draft vocabulary has probability 0 there.
  float* draft_probs = nullptr;
  std::byte* scratch = nullptr;  // decode_scratch_bytes()
  int n_threads = 1;             // CPU only

  int64_t* module_lengths() const { return lengths + batch; }
  int64_t rows_per_sequence() const { return num_draft_tokens + 1; }
};

// Bytes of scratch for decode_step() and prefill() with this number of threads.
int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy, int n_threads);

// tokens: [batch, k + 1], the accepted draft tokens, one token of the base model's own, then -1.
// counts: [batch], how many new tokens each row has: 0 for an idle sequence, below 0 for one that failed (kNotFinite,
// ...).
void decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts);

// Fills the caches of `sequence` with prompt [n_prompt] from position 0 on, and sets its pending tokens. On an error the
// sequence is idle. interrupted: asked after each kPrefillRows rows, when other threads may run too; true ends the
// prefill. Null: never.
Status prefill(const DecodeState& state, int64_t sequence, const int64_t* prompt, int64_t n_prompt,
               bool (*interrupted)() = nullptr);

}  // namespace recycle
